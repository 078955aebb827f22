"""Bring a line's merged model up to date with its members.

    snapshot --> onboard what is missing --> stitch --> evaluate --> log --> gate --> promote
    failed gate --> reject; the new members one by one, oldest first: those that fail are held,
                    the rest is promoted

It looks at what the head holds, not at what started it; when the newest merged version is
already that, it does nothing and says so. It may be killed anywhere and run again.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from restitch.flows.audit.report import Reports, mirror
from restitch.flows.audit.urls import mlflow_run
from restitch.flows.lines.adopt_mlflow import adopt
from restitch.flows.onboard import attempts_at, died_at, is_outdated, onboard
from restitch.flows.promotion.candidates import Candidate, make_candidate
from restitch.flows.promotion.snapshot import Snapshot, localized_models, take_snapshot
from restitch.flows.promotion.transitions import MovedError, hold, promote, record_version, reject
from restitch.merging.digests import digest_json
from restitch.merging.errors import GateFailed, RestitchError, Unavailable
from restitch.registry.gates.gate import GateOutcome
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import Member
from restitch.registry.ledger.records import MergedRecord
from restitch.tasks.inputs.checkpoints import check_device
from restitch.tasks.runtime.console import say, warn
from restitch.tasks.runtime.crash_recovery import mark_silent_runs
from restitch.tasks.runtime.engine import flow
from restitch.tasks.runtime.events import (
    has_workers,
    is_queued,
    is_workers_run,
    start_run,
    this_run,
)
from restitch.tasks.runtime.merge_lease import merge_lease
from restitch.tasks.runtime.prefect_artifacts import show_remerged
from restitch.tasks.runtime.workspace import workspace

# What killed work left behind is removed when nothing can be running on it any more.
LEFTOVERS_AFTER = 24 * 3600.0

ATTEMPTS = 20
# Nobody waits in front of a run for the address that its artifact names.
LINK_PATIENCE = 10.0

Action = Literal["unchanged", "empty", "promoted", "rejected", "candidate", "covered"]


@dataclass(frozen=True)
class RemergeOutcome:
    """What a remerge did.

    Attributes:
        action: unchanged, empty (no member yet), promoted, rejected (gates failed and nothing
            of it could be kept), candidate (promotion is switched off), covered (another
            remerge waits and will see all that this one would have).
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
    check_device(ledger.state().spec)
    if is_workers_run():
        mark_silent_runs(line)
    with merge_lease(space, line) as acquired:
        if not acquired:
            return _outcome(ledger, "covered", None, ())
        space.home.sweep(LEFTOVERS_AFTER)
        _take_in(line)
        mirror(ledger.line)
        outcome = _merge_until_settled(ledger, _onboard_missing(ledger), force)
    record = None if outcome.version is None else ledger.state().versions[outcome.version]
    link = None if record is None or this_run() is None else mlflow_run(line, record, LINK_PATIENCE)
    show_remerged(outcome.as_dict(), link)
    return outcome


def _merge_until_settled(ledger: Ledger, localized: tuple[str, ...], force: bool) -> RemergeOutcome:
    for _ in range(ATTEMPTS):
        snapshot = take_snapshot(ledger)
        if not snapshot.members:
            say(f"{ledger.line}: no model is ready to be merged")
            return _outcome(ledger, "empty", None, localized)
        try:
            outcome = _settle(ledger, snapshot, localized, force)
        except MovedError:
            say(f"{ledger.line}: the line has changed meanwhile, looking again")
            continue
        if outcome.record is not None and outcome.action != "unchanged":
            # Here, and not while MLflow is written: others on this host would wait for it.
            Reports(ledger).analysis(ledger.merged(outcome.record["version"]))
        mirror(ledger.line)
        return outcome
    raise Unavailable(
        f"line {ledger.line} is being merged by others all the time",
        found=f"another line in {ATTEMPTS} attempts",
        hint="run the same command again",
    )


def _take_in(line: str) -> None:
    """Take in what was registered in MLflow alone; the members do not wait for that."""
    try:
        adopt(line)
    except Unavailable as error:
        warn(f"MLflow cannot be asked for new models now: {error.message()}")


def _onboard_missing(ledger: Ledger) -> tuple[str, ...]:
    """Onboard every registered model that an event missed; the others do not wait for it.

    So it goes with members whose masks the line now chooses in another way. Where there are
    workers, a run on their pool is started for each, and its mask starts the next remerge.
    """
    line_state, done = ledger.state(), []
    newest = {task: (task, number, model) for task, number, model in localized_models(line_state)}
    outdated = [found for found in newest.values() if is_outdated(line_state, found[2])]
    missing = (*line_state.in_state("registered"), *outdated)
    to_workers = bool(missing) and has_workers()
    for task, version, _ in missing:
        try:
            if to_workers:
                _start_onboard(ledger, task, version)
            elif onboard(ledger.line, task, version).localized:
                done.append(f"{task} {version}")
        except RestitchError as error:
            warn(f"{task} version {version} cannot be onboarded now: {error.message()}")
    return tuple(done)


def _start_onboard(ledger: Ledger, task: str, version: int) -> None:
    """Start a run on the workers' pool, unless one is at work or waits for a worker."""
    line_state, attempts = ledger.state(), attempts_at(ledger, task, version)
    died = {one.number for one in died_at(attempts)}
    at_work = [one for one in attempts.unfinished() if one.number not in died]
    asked = {"line": line_state.line, "task": task, "version": version}
    if at_work or is_queued("onboard", asked):
        say(f"{line_state.line}: {task} version {version} is being onboarded")
        return
    # Another attempt, another key: a run that ended without a mask may be started again.
    key = digest_json([asked, line_state.spec.localize.to_json(), attempts.count])
    start_run("onboard", asked, key)
    say(f"{line_state.line}: a worker onboards {task} version {version}")


def _settle(
    ledger: Ledger, snapshot: Snapshot, localized: tuple[str, ...], force: bool
) -> RemergeOutcome:
    """Merge all members; where that fails, keep those whose joining does not."""
    if snapshot.settled is not None and not force:
        version = snapshot.settled.version
        say(f"{ledger.line}: nothing changed since version {version}")
        return _outcome(ledger, "unchanged", version, localized)
    everything = make_candidate(snapshot, snapshot.members, again=force)
    known = snapshot.merge_of(everything.patch.recipe, everything.members)
    if known is not None:
        again = f"version {known.version} was made again: the same bytes"
        say(
            f"{ledger.line} {again}"
            if force
            else f"{ledger.line}: the best is version {known.version} still"
        )
        return _outcome(ledger, "unchanged", known.version, localized)
    version = record_version(ledger, snapshot, everything)
    if everything.passed:
        done = promote(ledger, snapshot, everything, version)
        return _outcome(ledger, done, version, localized)
    reject(ledger, version, everything)
    kept, held = _one_by_one(snapshot)
    # Before the rest is promoted: who is killed between them would try them all again.
    for member, failed in held:
        hold(ledger, snapshot, member, failed)
    action: Action = "rejected"
    if kept is not None and not kept.is_version(snapshot.champion):
        version = record_version(ledger, snapshot, kept)
        if kept.passed:
            action = promote(ledger, snapshot, kept, version)
        else:
            reject(ledger, version, kept)
    return _outcome(
        ledger,
        action,
        version,
        localized,
        held={f"{m.task} {m.version}": [str(g.note) for g in failed] for m, failed in held},
    )


def _one_by_one(
    snapshot: Snapshot,
) -> tuple[Candidate | None, list[tuple[Member, tuple[GateOutcome, ...]]]]:
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
        ledger.state().champion,
        localized,
        held or {},
        () if record is None else tuple(g.gate for g in record.gates if not g.passed),
        None if record is None else record.to_json(),
    )
