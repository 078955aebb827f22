"""The acts of a remerge: record, promote, reject and hold, each done once.

Each act looks at the line's state at the moment of its swap, so an act that this run or a killed
one has done is not done again. If the champion or the settings have changed or a member was retired
since the run began, recording and promoting raise `MovedError`, and the run starts again. If the
line was paused, they raise `PausedError`, and the run ends.
"""

from typing import Literal

from restitch.flows.promotion.candidates import Candidate
from restitch.flows.promotion.lost_skill import why_not_joined
from restitch.flows.promotion.pauses import check_not_paused
from restitch.flows.promotion.snapshot import CIRCUMSTANCES, Snapshot, find_rejection
from restitch.registry.gates.gate import GateOutcome
from restitch.registry.ledger.finetuned_models import Member
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import LineState
from restitch.tasks.runtime.console import say, warn
from restitch.tasks.runtime.notify import notify
from restitch.tasks.runtime.workspace import actor

# The settings of a line on which a merged version and its verdict depend.
_DECISIVE = {"method", "localize", "gates", "retention"}


class MovedError(Exception):
    """The champion or the settings have changed, or a member has left, since the snapshot."""


def record_version(ledger: Ledger, snapshot: Snapshot, candidate: Candidate) -> int:
    """Record a candidate as a merged version, unless the line has the same, with the same verdict.

    That one is the newest version, or the one that waits for its promotion.

    Returns:
        The number of the version.
    """
    recorded: list[int] = []

    def change(line_state: LineState) -> LineState | None:
        recorded.clear()
        _check_unmoved(line_state, snapshot, candidate)
        for known in (line_state.newest, line_state.candidate):
            if known is None or not candidate.is_version(ledger.merged(known)):
                continue
            if ledger.merged(known).passed == candidate.passed:
                recorded.append(known)
                return None
            if known == line_state.candidate:  # it passed the gates of that time only
                line_state = line_state.without_candidate()
        recorded.append(line_state.next_version)
        record = candidate.record(ledger.line, line_state.next_version)
        ledger.objects.put_blob(record.to_bytes())
        return line_state.with_merged(record.digest, passed=candidate.passed)

    act = ledger.act(
        "merged",
        actor(),
        f"stitched {candidate.summary}",
        change,
        {"recipe": candidate.patch.recipe, "patch": candidate.patch.blob},
    )
    if act is not None:
        say(f"{ledger.line}: merged {candidate.summary} into version {recorded[0]}")
    return recorded[0]


def _check_unmoved(line_state: LineState, snapshot: Snapshot, candidate: Candidate) -> None:
    check_not_paused(line_state)
    # A candidate that was compared with another champion could drop that one's members.
    if line_state.champion != snapshot.line_state.champion:
        raise MovedError
    # A version that was judged by other settings must not count.
    settings = (one.spec.model_dump(include=_DECISIVE) for one in (line_state, snapshot.line_state))
    if next(settings) != next(settings):
        raise MovedError
    # A version that is made after a model was retired or forgotten must not hold it.
    states = (line_state.tasks[m.task].versions[m.version].state for m in candidate.members)
    if not {"retired", "forgotten"}.isdisjoint(states):
        raise MovedError


def promote(
    ledger: Ledger, snapshot: Snapshot, candidate: Candidate, version: int
) -> Literal["promoted", "candidate"]:
    """Make a version the champion, unless the line is pinned."""
    if ledger.state().pinned:
        say(f"{ledger.line} is pinned: version {version} stays a candidate")
        return "candidate"

    def change(line_state: LineState) -> LineState | None:
        if line_state.pinned or line_state.champion == version:
            return None
        _check_unmoved(line_state, snapshot, candidate)
        # A worker that was stalled must not promote a version that a newer one has superseded.
        if version not in (line_state.candidate, line_state.newest):
            return None
        return _with_members_of(line_state.promoted(version), candidate)

    for warning in candidate.warnings:
        warn(f"{ledger.line} version {version}: {warning}")
    reason = f"version {version}: {candidate.reason}"
    act = ledger.act("promoted", actor(), reason, change)
    if act is not None:
        say(f"{ledger.line} version {version} is the champion")
        drops = "; ".join(candidate.significant_drops.values())
        notify(act, {"drop": drops} if drops else None)
    return "promoted" if ledger.state().champion == version else "candidate"


def _with_members_of(line_state: LineState, candidate: Candidate) -> LineState:
    """Make the candidate's members ready, and older models of their tasks replaced."""
    for member in candidate.members:
        for number, model in line_state.tasks[member.task].versions.items():
            if number == member.version and model.state == "held":
                line_state = line_state.with_state(member.task, number, "ready")
            elif number < member.version and model.state in ("ready", "held"):
                line_state = line_state.with_state(
                    member.task, number, "replaced", f"version {member.version} replaced it"
                )
    return line_state


def reject(
    ledger: Ledger, snapshot: Snapshot, version: int, candidate: Candidate, *, final: bool
) -> None:
    """Record in the trail, once, that gates block a version.

    If it is `final`, because no part of the version can be promoted and no model is to be held, it
    is recorded once for each of the circumstances; later remerges need not try again in these.
    """
    record = ledger.merged(version)
    digests = {"patch": candidate.patch.blob}
    digests |= {CIRCUMSTANCES: snapshot.circumstances} if final else {}

    def change(line_state: LineState) -> LineState | None:
        known = find_rejection(ledger, record)
        is_known = known is not None and digests.items() <= known.digests.items()
        return None if is_known else line_state

    reason = f"version {version}: {_notes(candidate.failed)}"
    act = ledger.act("rejected", actor(), reason, change, digests)
    if act is not None:
        warn(f"{ledger.line} {reason}")
        notify(act)


def hold(ledger: Ledger, snapshot: Snapshot, member: Member, candidate: Candidate) -> None:
    """Keep a model out of merges until members, gates, method or data change.

    Args:
        ledger: of the line.
        snapshot: of the line.
        member: the model.
        candidate: the merge with it, which gates block.
    """
    context, why = snapshot.context, "; ".join(why_held(snapshot, member, candidate))

    def change(line_state: LineState) -> LineState | None:
        model = line_state.tasks[member.task].versions[member.version]
        if model.state not in ("ready", "held"):
            return None
        if model.state == "held" and model.facts.held_in == context:
            return None
        facts = model.facts.model_copy(update={"held_in": context})
        return line_state.with_state(member.task, member.version, "held", why, facts=facts)

    reason = f"{member.task} {member.version}: {why}"
    act = ledger.act("held", actor(), reason, change)
    if act is not None:
        warn(f"{ledger.line} holds {reason}")
        notify(act)


def why_held(snapshot: Snapshot, member: Member, candidate: Candidate) -> list[str]:
    """The gates that block a merge with a new member, and what is known of the cause."""
    spec, failed = snapshot.line_state.spec, candidate.failed
    cause = why_not_joined(spec, member, candidate.results, candidate.drops, failed)
    return [*(str(gate.note) for gate in failed), *([] if cause is None else [cause])]


def _notes(gates: tuple[GateOutcome, ...]) -> str:
    return "; ".join(str(gate.note) for gate in gates)
