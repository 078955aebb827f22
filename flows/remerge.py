"""Bring a line's merged model up to date with its members.

    onboard new models --> snapshot --> stitch --> evaluate --> gates --> record --> promote
    a gate blocks --> reject; try the new members one by one, oldest first: hold those that are
                      blocked, promote the rest

`remerge` looks at the line's state and not at the event that started it. If the newest merged
version already holds all members, nothing happens. It can be killed at any point and run again.

If the line's settings for masks change, `remerge` waits until all members have new masks, so that
no version mixes old and new ones. If a gate blocks the champion's own members with new masks or a
new method, the settings are at fault: the version is rejected, and no member is held.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from restitch.flows.audit.report import Reports, mirror
from restitch.flows.audit.urls import mlflow_run
from restitch.flows.lines.adopt_mlflow import adopt
from restitch.flows.onboard import attempts_at, died_at, is_outdated, onboard
from restitch.flows.outcome import Outcome
from restitch.flows.promotion.candidates import Candidate, make_candidate
from restitch.flows.promotion.masks import has_old_mask, needs_new_mask
from restitch.flows.promotion.pauses import PausedError, check_not_paused
from restitch.flows.promotion.snapshot import (
    Snapshot,
    needed_models,
    newest_with_gain,
    take_snapshot,
)
from restitch.flows.promotion.transitions import (
    MovedError,
    hold,
    promote,
    record_version,
    reject,
    why_held,
)
from restitch.merging.digests import digest_json
from restitch.merging.errors import GateFailed, RestitchError, Unavailable
from restitch.registry.ledger.finetuned_models import Member, ModelKey
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.records import MergedRecord
from restitch.tasks.inputs.live_base import check_device
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

Action = Literal[
    "unchanged", "empty", "waiting", "promoted", "rejected", "candidate", "covered", "paused"
]

# Why a model has no new mask: this call started a run, or an earlier run still goes on.
_STARTED = "a worker is to make its new mask"
_AT_WORK = "a worker makes its new mask"


@dataclass(frozen=True)
class RemergeOutcome(Outcome):
    """The result of a remerge.

    Attributes:
        action: unchanged, empty (no member yet), waiting (for new masks of members), promoted,
            rejected (gates block it and no part could be promoted), candidate (the line is
            pinned), covered (another remerge that waits will do the same work), paused (the line
            or its schedule is paused).
        version: the merged version that was made, or that exists already.
        localized: the models that this run localized, as "task version".
        held: the models that this run held, with the gates that block them and the cause.
        failed: the gates that the version did not pass.
        missing: the members without a new mask, with the reason.
        warnings: losses of tasks and gates that only warn, if the version was promoted.
        record: the record of the version.
    """

    line: str
    action: Action
    version: int | None
    champion: int | None
    localized: tuple[str, ...] = ()
    held: dict[str, list[str]] = field(default_factory=dict)
    failed: tuple[str, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    record: MergedRecord | None = None

    @property
    def exit_code(self) -> int:
        """0, or the code of a failed gate, or of masks that could not be made."""
        if set(self.missing.values()) - {_STARTED, _AT_WORK}:
            return Unavailable.exit_code
        return GateFailed.exit_code if self.held or self.action == "rejected" else 0


@flow("remerge", "{line}")
def remerge(line: str, force: bool = False, republish: bool = False) -> RemergeOutcome:
    """Merge the ready members, evaluate the result, and promote it if its gates pass.

    Args:
        line: the line's name.
        force: stitch and evaluate again although nothing changed; the bytes must be the same.
        republish: write everything that MLflow shows of the line again, such as models of versions
            from before an upgrade.

    Raises:
        BadInput: the line is paused, and a person asks; a worker's run ends without a change.
        Unavailable: `republish` was asked for, and MLflow cannot be used.
    """
    ledger = workspace().ledger(line)
    try:
        outcome = _brought_up_to_date(ledger, force, republish)
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


def _brought_up_to_date(ledger: Ledger, force: bool, republish: bool) -> RemergeOutcome:
    space, line = workspace(), ledger.line
    line_state = ledger.state()
    check_not_paused(line_state, by_schedule=is_scheduled_run())
    check_device(line_state.spec)
    if is_workers_run():
        mark_silent_runs(line)
    with merge_lease(space, line) as acquired:
        if not acquired and republish:
            raise Unavailable(
                f"line {line} is not published again",
                found="another remerge of the line runs, and one more waits for it",
                hint="run the same command when they have ended",
            )
        if not acquired:
            return _outcome(ledger, "covered", None)
        space.home.sweep(LEFTOVERS_AFTER)
        try:
            adopt(line)
        except Unavailable as error:  # go on without the models that only MLflow has
            warn(f"models that were registered in MLflow are not adopted now: {error.message()}")
        if not mirror(line, again=republish) and republish:
            raise Unavailable(
                f"line {line} is not published again",
                found="MLflow cannot be used now; the warning above says why",
                hint="run the same command when it can be reached",
            )
        return _merge_until_settled(ledger, force)


def _merge_until_settled(ledger: Ledger, force: bool) -> RemergeOutcome:
    localized: list[str] = []
    for _ in range(ATTEMPTS):
        made, problems = _onboard_missing(ledger)
        localized += made
        snapshot = take_snapshot(ledger)
        try:
            missing = _without_new_masks(snapshot, problems)
            if missing or not snapshot.members:
                outcome = _not_merged(ledger, missing)
            else:
                outcome = _settle(ledger, snapshot, force)
        except MovedError:
            say(f"{ledger.line}: the line changed during the merge, starting again")
            continue
        outcome = replace(outcome, localized=tuple(localized))
        if outcome.record is not None and outcome.action != "unchanged":
            # Done before MLflow is written, because other processes of this host wait for that.
            Reports(ledger).analysis(outcome.record)
        mirror(ledger.line)
        return outcome
    raise Unavailable(
        f"gave up after {ATTEMPTS} attempts: line {ledger.line} kept changing",
        expected="a line whose champion, members and settings stay the same during one merge",
        found="another process promoted, retired or configured in each attempt",
        hint="run the same command again; `restitch history` shows who changes the line",
    )


def _onboard_missing(ledger: Ledger) -> tuple[tuple[str, ...], dict[ModelKey, str]]:
    """Onboard registered models that no event started, and models that are outdated.

    With workers, start a run in their pool for each; its mask starts the next remerge.

    Returns:
        The models that this process localized, and those that it could not, with the reason.
    """
    line_state, localized, problems = ledger.state(), [], {}
    missing = [key for key, _ in line_state.in_state("registered")]
    missing += [key for key, _ in needed_models(line_state) if is_outdated(line_state, key)]
    to_workers = bool(missing) and has_workers()
    for key in missing:
        try:
            if to_workers:
                problems[key] = _start_onboard(ledger, key)
            elif onboard(ledger.line, key.task, key.version).localized:
                localized.append(str(key))
            else:
                problems[key] = "its new mask cannot be made"
        except RestitchError as error:
            problems[key] = error.summary
            warn(f"{key.task} version {key.version} is not onboarded now: {error.message()}")
    return tuple(localized), problems


def _without_new_masks(snapshot: Snapshot, problems: Mapping[ModelKey, str]) -> dict[str, str]:
    """The members whose masks are older than the line's settings, with the reason.

    A held model is among them while an earlier run makes its mask, because the gates judge it
    again. A run that failed is started again, and does not stop the merges of the others.

    Raises:
        MovedError: the settings changed after the masks were made.
    """
    keys = [
        ModelKey(member.task, member.version)
        for member in snapshot.members
        if needs_new_mask(snapshot.line_state, member.model)
    ]
    if not problems.keys() >= set(keys):
        raise MovedError
    held = [
        key
        for key, model in newest_with_gain(snapshot.line_state)
        if model.state == "held" and needs_new_mask(snapshot.line_state, model)
    ]
    keys += [key for key in held if problems.get(key) == _AT_WORK]
    return {str(key): problems[key] for key in keys}


def _not_merged(ledger: Ledger, missing: dict[str, str]) -> RemergeOutcome:
    """The outcome without a merge: no member yet, or members without new masks."""
    if not missing:
        say(f"{ledger.line}: no member yet, nothing to merge")
        return _outcome(ledger, "empty", None)
    reasons = "; ".join(f"{key}: {reason}" for key, reason in missing.items())
    say(f"{ledger.line}: no merge before all members have new masks; {reasons}")
    if set(missing.values()) - {_STARTED, _AT_WORK}:
        warn(
            "restore the model's source, register a newer model, retire the task, or set back "
            "the line's `localize` and `method`"
        )
    return replace(_outcome(ledger, "waiting", None), missing=missing)


def _start_onboard(ledger: Ledger, key: ModelKey) -> str:
    """Start a run in the workers' pool, unless one works on the model or waits for a worker.

    Returns:
        Why the model has no new mask yet.
    """
    line_state, attempts = ledger.state(), attempts_at(ledger, key)
    died = {attempt.number for attempt in died_at(attempts)}
    at_work = [attempt for attempt in attempts.unfinished() if attempt.number not in died]
    parameters = {"line": line_state.line, "task": key.task, "version": key.version}
    if at_work or is_queued("onboard", parameters):
        say(f"{line_state.line}: another run onboards {key.task} version {key.version}")
        return _AT_WORK
    # Each attempt has another key, so that a run which ended without a mask can start again.
    idempotency = digest_json([parameters, line_state.spec.localize.to_json(), attempts.count])
    start_run("onboard", parameters, idempotency)
    say(f"{line_state.line}: a worker onboards {key.task} version {key.version}")
    return _STARTED


def _settle(ledger: Ledger, snapshot: Snapshot, force: bool) -> RemergeOutcome:
    """Merge all members; if a gate fails, promote those whose joining passes."""
    if snapshot.settled is not None and not force:
        version, champion = snapshot.settled.version, snapshot.line_state.champion
        rejected = snapshot.settled is snapshot.rejected
        say(f"{ledger.line}: nothing changed since version {version}{' was rejected' * rejected}")
        return _outcome(ledger, "unchanged", champion if rejected else version)
    everything = make_candidate(snapshot, snapshot.members, again=force)
    known = snapshot.merge_of(everything.patch.recipe, everything.members)
    if known is not None:
        same = "has the same bytes again" if force else "is still the best"
        say(f"{ledger.line}: version {known.version} {same}")
        return _outcome(ledger, "unchanged", known.version)
    version = record_version(ledger, snapshot, everything)
    if everything.passed:
        return _promoted(ledger, snapshot, everything, version)
    rest, held = _one_by_one(snapshot)
    if rest is not None and rest.patch.recipe == everything.patch.recipe:
        rest = None
    reject(ledger, snapshot, version, everything, final=rest is None and not held)
    # Done before the rest is promoted: a run killed in between would try all of them again.
    for member, candidate in held:
        hold(ledger, snapshot, member, candidate)
    outcome = _outcome(ledger, "rejected", version)
    if rest is not None and not rest.is_version(snapshot.champion):
        version = record_version(ledger, snapshot, rest)
        if rest.passed:
            outcome = _promoted(ledger, snapshot, rest, version)
        else:
            reject(ledger, snapshot, version, rest, final=False)
            outcome = _outcome(ledger, "rejected", version)
    reasons = {f"{m.task} {m.version}": why_held(snapshot, m, tried) for m, tried in held}
    return replace(outcome, held=reasons)


def _promoted(
    ledger: Ledger, snapshot: Snapshot, candidate: Candidate, version: int
) -> RemergeOutcome:
    action = promote(ledger, snapshot, candidate, version)
    return replace(_outcome(ledger, action, version), warnings=candidate.warnings)


def _one_by_one(
    snapshot: Snapshot,
) -> tuple[Candidate | None, list[tuple[Member, Candidate]]]:
    """Try the new members on top of the champion's, oldest first.

    Returns:
        The last candidate that passed, if there is one, and the members that are blocked, each with
        the candidate that failed. Nothing, if the champion's own members do not pass with the
        line's new method or masks.
    """
    current = snapshot.champion_members
    if any(has_old_mask(snapshot.line_state, member.model) for member in current):
        return None, []
    best = make_candidate(snapshot, current) if current else None
    if best is not None and best.joining and not best.passed:
        line = snapshot.line_state.line
        warn(f"{line}: no model is held, because the champion's own fail with the new settings")
        return None, []
    held = []
    for member in snapshot.joining:
        candidate = make_candidate(snapshot, snapshot.joined(current, member))
        if candidate.passed:
            current, best = candidate.members, candidate
        else:
            held.append((member, candidate))
    return best, held


def _outcome(ledger: Ledger, action: Action, version: int | None) -> RemergeOutcome:
    record = None if version is None else ledger.merged(version)
    return RemergeOutcome(
        ledger.line,
        action,
        version,
        ledger.state().champion,
        failed=() if record is None else tuple(g.gate for g in record.gates if not g.passed),
        record=record,
    )
