"""Bring a line's merged model up to date with its members.

    snapshot --> onboard what is missing --> stitch --> evaluate --> log --> gate --> promote
    failed gate --> reject; the new members one by one, oldest first: those that fail are held,
                    the rest is promoted

It looks at what the head holds, not at what started it; when the newest merged version is
already that, it does nothing and says so. It may be killed anywhere and run again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from flows.candidates import Candidate, make_candidate
from flows.gates import Check
from flows.onboard import is_outdated, onboard
from flows.snapshot import Snapshot, localized_models, take_snapshot
from merging.errors import GateFailed, RestitchError
from registry.head import Head, Member
from registry.history import MergedRecord
from registry.ledger import Ledger
from tasks.engine import flow
from tasks.models import check_device
from tasks.publish import mirror
from tasks.reporting import say, warn
from tasks.workspace import Workspace, actor, workspace

# What killed work left behind is removed when nothing can be running on it any more.
LEFTOVERS_AFTER = 24 * 3600.0

Action = Literal["unchanged", "empty", "promoted", "rejected", "candidate"]


@dataclass(frozen=True)
class RemergeOutcome:
    """What a remerge did.

    Attributes:
        action: unchanged, empty (no member yet), promoted, rejected (gates failed and nothing
            of it could be kept), candidate (promotion is switched off).
        version: the version that this is about.
        localized: the models that this run localized, as "task version".
        held: the models that this run held, with the gates that decided.
        record: the version's record.
    """

    line: str
    action: Action
    version: int | None
    champion: int | None
    localized: tuple[str, ...] = ()
    held: dict[str, list[str]] = field(default_factory=dict)
    failed: tuple[str, ...] = ()
    record: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @property
    def exit_code(self) -> int:
        """0, or that of a failed gate."""
        return GateFailed.exit_code if self.held or self.action == "rejected" else 0


@flow("remerge", "{line}")
def remerge(line: str, force: bool = False) -> RemergeOutcome:
    """Merge what is ready, evaluate it, and promote it if its gates pass.

    Args:
        line: the line's name.
        force: stitch and evaluate anew although nothing changed; the bytes must be the same.
    """
    space = workspace()
    ledger = space.ledger(line)
    check_device(ledger.head().spec)
    with _alone(space, line):
        space.home.sweep(LEFTOVERS_AFTER)
        mirror(ledger.line)
        localized = _onboard_missing(ledger)
        snapshot = take_snapshot(ledger)
        if not snapshot.members:
            say(f"{line}: no model is ready to be merged")
            return RemergeOutcome(line, "empty", None, ledger.head().champion, localized)
        outcome = _settle(ledger, snapshot, localized, force)
        mirror(ledger.line)
        return outcome


def _onboard_missing(ledger: Ledger) -> tuple[str, ...]:
    """Onboard every registered model that an event missed; the others do not wait for it.

    So it goes with members whose masks the line now chooses in another way.
    """
    head, done = ledger.head(), []
    newest = {task: (task, number, model) for task, number, model in localized_models(head)}
    outdated = [found for found in newest.values() if is_outdated(head, found[2])]
    for task, version, _ in (*head.in_state("registered"), *outdated):
        try:
            if onboard(ledger.line, task, version).localized:
                done.append(f"{task} {version}")
        except RestitchError as error:
            warn(f"{task} version {version} cannot be onboarded now: {error.message()}")
    return tuple(done)


def _settle(
    ledger: Ledger, snapshot: Snapshot, localized: tuple[str, ...], force: bool
) -> RemergeOutcome:
    """Merge all members; where that fails, keep those whose joining does not."""
    if snapshot.is_settled and not force:
        assert snapshot.settled is not None
        version = snapshot.settled.version
        say(f"{ledger.line}: nothing changed since version {version}")
        return _outcome(ledger, "unchanged", version, localized)
    everything = make_candidate(snapshot, snapshot.members, again=force)
    version = _record(ledger, everything)
    if everything.passed:
        return _promote(ledger, everything, version, localized)
    _reject(ledger, version, everything)
    kept, held = _one_by_one(snapshot)
    # Before the rest is promoted: who is killed between them would try them all again.
    for member, checks in held:
        _hold(ledger, snapshot, member, checks)
    if kept is not None and not kept.is_version(snapshot.champion):
        version = _record(ledger, kept)
        if kept.passed:
            _promote(ledger, kept, version, localized)
        else:
            _reject(ledger, version, kept)
    return _outcome(
        ledger,
        "rejected" if ledger.head().champion != version else "promoted",
        version,
        localized,
        held={f"{m.task} {m.version}": [str(c) for c in checks] for m, checks in held},
    )


def _one_by_one(
    snapshot: Snapshot,
) -> tuple[Candidate | None, list[tuple[Member, tuple[Check, ...]]]]:
    """Try the new members on top of the champion's, oldest first.

    Returns:
        The last candidate that passed, if there is one, and the members that failed with the
        checks that decided.
    """
    current = snapshot.champion_members
    kept = make_candidate(snapshot, current) if current else None
    held = []
    for member in snapshot.joining:
        trial = make_candidate(snapshot, snapshot.joined(current, member))
        if trial.passed:
            current, kept = trial.members, trial
        else:
            held.append((member, trial.failed))
    return kept, held


def _record(ledger: Ledger, candidate: Candidate) -> int:
    """Make a merged version of a candidate, unless it is there already.

    The newest version may be it, whatever became of it. One that failed its gates may also be
    an older one that the champion has not passed: whoever was killed after making the next
    version comes by here again.
    """
    found: list[int] = []

    def change(head: Head) -> Head | None:
        found.clear()
        oldest = (head.newest or 0) if candidate.passed else (head.champion or 0) + 1
        for version in sorted((v for v in head.versions if v >= oldest), reverse=True):
            if candidate.is_version(ledger.merged(version)):
                found.append(version)
                return None
        found.append(head.next_version)
        record = candidate.record(ledger.line, head.next_version)
        ledger.objects.put_blob(record.to_bytes())
        return head.with_merged(record.digest)

    members = ", ".join(f"{m.task} {m.version}" for m in candidate.members)
    act = ledger.act(
        "merged",
        actor(),
        f"stitched {members}",
        change,
        {"recipe": candidate.patch.recipe, "patch": candidate.patch.blob},
    )
    if act is not None:
        say(f"{ledger.line} version {found[0]}: {members}")
    return found[0]


def _promote(
    ledger: Ledger, candidate: Candidate, version: int, localized: tuple[str, ...]
) -> RemergeOutcome:
    """Put a version in use, unless promotion is switched off."""
    if ledger.head().pinned:
        say(f"{ledger.line} is pinned: version {version} stays a candidate")
        return _outcome(ledger, "candidate", version, localized)

    def change(head: Head) -> Head | None:
        if head.pinned or head.champion == version:
            return None
        # A worker that was away must not put back what has been superseded meanwhile.
        if head.newest != version:
            return None
        return _with_members_of(head.promoted(version), candidate)

    checks = "; ".join(str(check) for check in candidate.checks) or "no gates"
    if ledger.act("promoted", actor(), f"version {version}: {checks}", change) is not None:
        say(f"{ledger.line} version {version} is the champion")
    return _outcome(ledger, "promoted", version, localized)


def _with_members_of(head: Head, candidate: Candidate) -> Head:
    """The head with the candidate's members ready and what they took the place of replaced."""
    for member in candidate.members:
        for number, model in head.tasks[member.task].versions.items():
            if number == member.version and model.state == "held":
                head = head.with_state(member.task, number, "ready")
            elif number < member.version and model.state in ("ready", "held"):
                head = head.with_state(
                    member.task, number, "replaced", f"version {member.version} took its place"
                )
    return head


def _reject(ledger: Ledger, version: int, candidate: Candidate) -> None:
    """Say in the trail that a version failed its gates; once."""

    def change(head: Head) -> Head | None:
        # Newest first, so this looks back no further than the merge itself.
        for entry in ledger.entries():
            if entry.digests.get("patch") == candidate.patch.blob:
                if entry.kind == "rejected":
                    return None
                if entry.kind == "merged":
                    break
        return head

    failed = "; ".join(str(check) for check in candidate.failed)
    reason = f"version {version}: {failed}"
    if ledger.act("rejected", actor(), reason, change, {"patch": candidate.patch.blob}) is not None:
        warn(f"{ledger.line} {reason}")


def _hold(ledger: Ledger, snapshot: Snapshot, member: Member, checks: tuple[Check, ...]) -> None:
    """Keep a model out of merges until members, gates or data change."""
    failed = "; ".join(str(check) for check in checks if not check.passed)
    context = snapshot.context

    def change(head: Head) -> Head | None:
        model = head.tasks[member.task].versions[member.version]
        if model.state not in ("ready", "held"):
            return None
        if model.state == "held" and model.facts.get("held_in") == context:
            return None
        facts = {**model.facts, "held_in": context}
        return head.with_state(member.task, member.version, "held", failed, facts=facts)

    reason = f"{member.task} {member.version}: {failed}"
    if ledger.act("held", actor(), reason, change) is not None:
        warn(f"{ledger.line} holds {reason}")


def _outcome(
    ledger: Ledger,
    action: Action,
    version: int | None,
    localized: tuple[str, ...],
    held: dict[str, list[str]] | None = None,
) -> RemergeOutcome:
    record: MergedRecord | None = None if version is None else ledger.merged(version)
    return RemergeOutcome(
        ledger.line,
        action,
        version,
        ledger.head().champion,
        localized,
        held or {},
        () if record is None else tuple(g.gate for g in record.gates if not g.passed),
        None if record is None else record.to_json(),
    )


@contextmanager
def _alone(space: Workspace, line: str) -> Iterator[None]:
    """One remerge per line at a time on this host: saves work, decides nothing."""
    import fcntl

    folder = space.home.root / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"remerge-{line}").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
