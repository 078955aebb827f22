"""Bring a line's merged model up to date with its members.

    onboard new models --> snapshot --> stitch --> evaluate --> gates --> record --> promote
    a gate fails --> reject; try the new members one by one, oldest first: hold those that fail,
                     promote the rest

`remerge` looks at the line's state and not at the event that started it. If the newest merged
version already holds all members, nothing happens. It can be killed at any point and run again.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from restitch.flows.audit.report import Reports, mirror
from restitch.flows.audit.urls import mlflow_run
from restitch.flows.lines.adopt_mlflow import adopt
from restitch.flows.onboard import attempts_at, died_at, is_outdated, onboard
from restitch.flows.outcome import Outcome
from restitch.flows.promotion.candidates import Candidate, make_candidate
from restitch.flows.promotion.pauses import PausedError, check_not_paused
from restitch.flows.promotion.snapshot import Snapshot, newest_models, take_snapshot
from restitch.flows.promotion.transitions import MovedError, hold, promote, record_version, reject
from restitch.merging.digests import digest_json
from restitch.merging.errors import GateFailed, RestitchError, Unavailable
from restitch.registry.gates.gate import GateOutcome
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import Member, ModelKey
from restitch.registry.ledger.records import MergedRecord
from restitch.tasks.inputs.checkpoints import check_device
from restitch.tasks.runtime.console import say, warn
from restitch.tasks.runtime.crash_recovery import mark_silent_runs
from restitch.tasks.runtime.engine import flow
from restitch.tasks.runtime.events import (
    has_workers,
    is_queued,
    is_scheduled_run,
    is_workers_run,
    start_run,
    this_run,
)
from restitch.tasks.runtime.merge_lease import merge_lease
from restitch.tasks.runtime.prefect_artifacts import show_remerged
from restitch.tasks.runtime.workspace import workspace

# Scratch files of killed processes are removed after this many seconds.
LEFTOVERS_AFTER = 24 * 3600.0

ATTEMPTS = 20
# Seconds to wait for the address of the run in MLflow.
LINK_PATIENCE = 10.0

Action = Literal["unchanged", "empty", "promoted", "rejected", "candidate", "covered", "paused"]


@dataclass(frozen=True)
class RemergeOutcome(Outcome):
    """The result of a remerge.

    Attributes:
        action: unchanged, empty (no member yet), promoted, rejected (gates failed and no part
            could be promoted), candidate (the line is pinned), covered (another remerge that
            waits will do the same work), paused (the line or its schedule is paused).
        version: the merged version that was made, or that exists already.
        localized: the models that this run localized, as "task version".
        held: the models that this run held, with the gates that failed.
        failed: the gates that the version failed.
        record: the record of the version.
    """

    line: str
    action: Action
    version: int | None
    champion: int | None
    localized: tuple[str, ...] = ()
    held: dict[str, list[str]] = field(default_factory=dict)
    failed: tuple[str, ...] = ()
    record: MergedRecord | None = None

    @property
    def exit_code(self) -> int:
        """0, or the code of a failed gate."""
        return GateFailed.exit_code if self.held or self.action == "rejected" else 0


@flow("remerge", "{line}")
def remerge(line: str, force: bool = False) -> RemergeOutcome:
    """Merge the ready members, evaluate the result, and promote it if its gates pass.

    Args:
        line: the line's name.
        force: stitch and evaluate again although nothing changed; the bytes must be the same.

    Raises:
        BadInput: the line is paused, and a person asks; a worker's run ends without a change.
    """
    ledger = workspace().ledger(line)
    try:
        outcome = _brought_up_to_date(ledger, force)
    except PausedError as error:
        if not is_workers_run():
            raise
        say(error.message())
        outcome = _outcome(ledger, "paused", None)
    if outcome.action == "covered":
        return outcome
    record = None if outcome.version is None else ledger.state().versions[outcome.version]
    link = None if record is None or this_run() is None else mlflow_run(line, record, LINK_PATIENCE)
    show_remerged(outcome.as_dict(), link)
    return outcome


def _brought_up_to_date(ledger: Ledger, force: bool) -> RemergeOutcome:
    space, line = workspace(), ledger.line
    line_state = ledger.state()
    check_not_paused(line_state, by_schedule=is_scheduled_run())
    check_device(line_state.spec)
    if is_workers_run():
        mark_silent_runs(line)
    with merge_lease(space, line) as acquired:
        if not acquired:
            return _outcome(ledger, "covered", None)
        space.home.sweep(LEFTOVERS_AFTER)
        try:
            adopt(line)
        except Unavailable as error:  # go on without the models that only MLflow has
            warn(f"models that were registered in MLflow are not adopted now: {error.message()}")
        mirror(line)
        localized = _onboard_missing(ledger)
        return replace(_merge_until_settled(ledger, force), localized=localized)


def _merge_until_settled(ledger: Ledger, force: bool) -> RemergeOutcome:
    for _ in range(ATTEMPTS):
        snapshot = take_snapshot(ledger)
        if not snapshot.members:
            say(f"{ledger.line}: no member yet, nothing to merge")
            return _outcome(ledger, "empty", None)
        try:
            outcome = _settle(ledger, snapshot, force)
        except MovedError:
            say(f"{ledger.line}: the line changed during the merge, starting again")
            continue
        if outcome.record is not None and outcome.action != "unchanged":
            # Done before MLflow is written, because other processes of this host wait for that.
            Reports(ledger).analysis(outcome.record)
        mirror(ledger.line)
        return outcome
    raise Unavailable(
        f"gave up after {ATTEMPTS} attempts: line {ledger.line} kept changing",
        expected="a line whose champion and members stay the same during one merge",
        found="another process promoted or retired in each attempt",
        hint="run the same command again; `restitch history` shows who changes the line",
    )


def _onboard_missing(ledger: Ledger) -> tuple[str, ...]:
    """Onboard registered models that no event started, and models that are outdated.

    With workers, start a run in their pool for each; its mask starts the next remerge.

    Returns:
        The models that this process localized.
    """
    line_state, localized = ledger.state(), []
    missing = [key for key, _ in line_state.in_state("registered")]
    missing += [key for key, _ in newest_models(line_state) if is_outdated(line_state, key)]
    to_workers = bool(missing) and has_workers()
    for key in missing:
        try:
            if to_workers:
                _start_onboard(ledger, key)
            elif onboard(ledger.line, key.task, key.version).localized:
                localized.append(str(key))
        except RestitchError as error:
            warn(f"{key.task} version {key.version} is not onboarded now: {error.message()}")
    return tuple(localized)


def _start_onboard(ledger: Ledger, key: ModelKey) -> None:
    """Start a run in the workers' pool, unless one works on the model or waits for a worker."""
    line_state, attempts = ledger.state(), attempts_at(ledger, key)
    died = {attempt.number for attempt in died_at(attempts)}
    at_work = [attempt for attempt in attempts.unfinished() if attempt.number not in died]
    parameters = {"line": line_state.line, "task": key.task, "version": key.version}
    if at_work or is_queued("onboard", parameters):
        say(f"{line_state.line}: another run onboards {key.task} version {key.version}")
        return
    # Each attempt has another key, so that a run which ended without a mask can start again.
    idempotency = digest_json([parameters, line_state.spec.localize.to_json(), attempts.count])
    start_run("onboard", parameters, idempotency)
    say(f"{line_state.line}: a worker onboards {key.task} version {key.version}")


def _settle(ledger: Ledger, snapshot: Snapshot, force: bool) -> RemergeOutcome:
    """Merge all members; if a gate fails, promote those whose joining passes."""
    if snapshot.settled is not None and not force:
        version = snapshot.settled.version
        say(f"{ledger.line}: nothing changed since version {version}")
        return _outcome(ledger, "unchanged", version)
    everything = make_candidate(snapshot, snapshot.members, again=force)
    known = snapshot.merge_of(everything.patch.recipe, everything.members)
    if known is not None:
        same = "has the same bytes again" if force else "is still the best"
        say(f"{ledger.line}: version {known.version} {same}")
        return _outcome(ledger, "unchanged", known.version)
    version = record_version(ledger, snapshot, everything)
    if everything.passed:
        return _outcome(ledger, promote(ledger, snapshot, everything, version), version)
    reject(ledger, version, everything)
    rest, held = _one_by_one(snapshot)
    # Done before the rest is promoted: a run killed in between would try all of them again.
    for member, failed in held:
        hold(ledger, snapshot, member, failed)
    action: Action = "rejected"
    if rest is not None and not rest.is_version(snapshot.champion):
        version = record_version(ledger, snapshot, rest)
        if rest.passed:
            action = promote(ledger, snapshot, rest, version)
        else:
            reject(ledger, version, rest)
    notes = {f"{m.task} {m.version}": [str(g.note) for g in failed] for m, failed in held}
    return _outcome(ledger, action, version, notes)


def _one_by_one(
    snapshot: Snapshot,
) -> tuple[Candidate | None, list[tuple[Member, tuple[GateOutcome, ...]]]]:
    """Try the new members on top of the champion's, oldest first.

    Returns:
        The last candidate that passed, if there is one, and the members that failed with the
        gates that they failed.
    """
    current = snapshot.champion_members
    best = make_candidate(snapshot, current) if current else None
    held = []
    for member in snapshot.joining:
        candidate = make_candidate(snapshot, snapshot.joined(current, member))
        if candidate.passed:
            current, best = candidate.members, candidate
        else:
            held.append((member, candidate.failed))
    return best, held


def _outcome(
    ledger: Ledger,
    action: Action,
    version: int | None,
    held: dict[str, list[str]] | None = None,
) -> RemergeOutcome:
    record = None if version is None else ledger.merged(version)
    return RemergeOutcome(
        ledger.line,
        action,
        version,
        ledger.state().champion,
        held=held or {},
        failed=() if record is None else tuple(g.gate for g in record.gates if not g.passed),
        record=record,
    )
