"""Register a finetuned model, and bring it into the merged model.

    add it to the line --> with workers: start them by an event and, if asked, wait for the result
                       --> without workers: onboard and remerge in this process
                       --> on a paused line: nothing more until it is resumed

The same weights are registered once for a task: registering them again finishes what is
unfinished. Other weights become the task's next version.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from restitch.flows.audit.report import mirror
from restitch.flows.lines.declare_task import present, resolve_spec
from restitch.flows.onboard import OnboardOutcome, onboard
from restitch.flows.outcome import Outcome
from restitch.flows.remerge import RemergeOutcome, remerge
from restitch.merging.errors import BadInput, CannotJoin, GateFailed, Unavailable
from restitch.modeling.families.family import get_family
from restitch.registry.ledger.finetuned_models import ModelFacts, ModelKey, ModelRef, ModelVersion
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import LineState, Pause
from restitch.registry.ledger.measurements import Acceptance, decisions
from restitch.registry.ledger.records import MergedRecord
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.inputs.checkpoints import describe_model, open_base
from restitch.tasks.inputs.heads import check_task_head
from restitch.tasks.inputs.task_data import same_task
from restitch.tasks.runtime.console import say, working
from restitch.tasks.runtime.events import MODEL_REGISTERED, announce, has_workers
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.run_progress import run_progress
from restitch.tasks.runtime.workspace import actor, workspace

POLL_SECONDS, REPORT_SECONDS = 0.5, 2.0


@dataclass(frozen=True)
class RegisterOutcome(Outcome):
    """The result of a registration.

    Attributes:
        already: whether these weights were registered for this task before.
        merged: the result of the remerge in this process, if there was one.
        handed_over: whether workers do the work.
        paused: the pause of the line; the model is localized and merged once it is resumed.
        champion: the number of the champion, if it holds the model.
        record: the record of that version.
    """

    onboarded: OnboardOutcome
    already: bool
    merged: RemergeOutcome | None = None
    handed_over: bool = False
    paused: Pause | None = None
    champion: int | None = None
    record: MergedRecord | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields and those of the onboarding as plain JSON values."""
        values = super().as_dict()
        return {**values.pop("onboarded"), **values}

    @property
    def exit_code(self) -> int:
        """0, or the code for the reason why the model is not in the merged model."""
        if self.onboarded.state == "quarantined":
            return CannotJoin.exit_code
        if self.onboarded.state == "held":
            return GateFailed.exit_code
        blocked = self.merged is not None and self.merged.action in ("rejected", "waiting")
        return self.merged.exit_code if self.merged is not None and blocked else 0


def register(
    line: str,
    task: Path | TaskSpec,
    source: str,
    *,
    merge: bool = True,
    replace_task: bool = False,
    copy: bool = False,
    here: bool = False,
    wait: bool = False,
    timeout: float | None = None,
    accepted: Mapping[str, str] | None = None,
) -> RegisterOutcome:
    """Register a finetuned model; without workers, also onboard it and remerge.

    Args:
        line: the line's name.
        task: the task's file, or what it says.
        source: the model: a folder, a hub id or an MLflow address.
        merge: remerge after onboarding.
        replace_task: allow the file to change the task.
        copy: copy the model's files into the store.
        here: do the work in this process even if there are workers.
        wait: with workers, return when the model is in the champion or was refused.
        timeout: the seconds to wait at most.
        accepted: checks to switch off for this model, each with the reason, which is recorded.

    Raises:
        BadInput: the task file, its data or the model cannot be read, or the file changes the
            task and `replace_task` is off, or a reason is empty. The line stays as it was.
        Unavailable: a server is away, the wait timed out, or the line is paused and `wait` is on;
            the model stays registered.
    """
    space = workspace()
    ledger = space.ledger(line)
    line_state = ledger.state()
    decided = {check: _acceptance(check, reason) for check, reason in (accepted or {}).items()}
    spec, remember_rows = resolve_spec(ledger, task, replace_task, source)
    # Nothing can join without it.
    line_ref = LineRef(line_state.spec, line_state.base)
    base = open_base(line_ref, space)
    model = describe_model(
        source, get_family(line_state.spec.family), space, line=line_ref, copy=copy
    )
    check_task_head(spec, base, model, space)
    remember_rows()
    key, already = _add(ledger, spec, model, replace_task, decided)
    if already:
        say(f"{key.task}: these weights are already version {key.version}")
    if ledger.state().is_paused:
        mirror(line)
        if wait:
            raise _never_merged(ledger, key)
        return _outcome(ledger, key, already)
    if not here and has_workers():
        if ledger.state().model(key).state == "registered":
            announce(MODEL_REGISTERED, line, *key)
        mirror(line)
        return _handed_over(ledger, key, already, wait, timeout)
    mirror(line)
    onboarded = onboard(line, *key)
    merged = None
    if merge and onboarded.state in ("ready", "held"):
        merged = remerge(line)
    return _outcome(ledger, key, already, onboarded, merged)


def _acceptance(check: str, reason: str) -> Acceptance:
    if not reason.strip():
        raise BadInput(
            f"{check} is accepted without a reason",
            expected="a reason, which the audit trail keeps",
            hint="give one with --reason",
        )
    return Acceptance(reason=reason.strip(), by=actor(), at=_now())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _add(
    ledger: Ledger,
    spec: TaskSpec,
    model: ModelRef,
    replace_task: bool,
    accepted: Mapping[str, Acceptance],
) -> tuple[ModelKey, bool]:
    """Add the model to the line as its task's next version, unless it is there already.

    Returns:
        Its key, and whether the line had it before.
    """
    added: list[tuple[ModelKey, bool]] = []
    # The value that an author measured belongs to the model, not to the task.
    described = spec.without_expected()
    facts = ModelFacts(expected=spec.expected, accepted=dict(accepted))

    def change(line_state: LineState) -> LineState | None:
        added.clear()
        task = line_state.tasks.get(spec.task)
        known = None if task is None else present(task, spec, model)
        if task is not None and known is not None:
            added.append((ModelKey(spec.task, known), True))
            # The same data at another path: the old path may be gone.
            moved = replace_task and described != task.spec.without_expected()
            after = line_state.with_task(described) if moved or not task.declared else line_state
            after = _with_expected(after, ModelKey(spec.task, known), spec.expected)
            after = _with_another_try(after, ModelKey(spec.task, known))
            after = after.with_accepted(ModelKey(spec.task, known), accepted)
            return None if after is line_state else after
        if task is None or not task.declared or not same_task(task.spec, spec):
            line_state = line_state.with_task(described)
        key = ModelKey(spec.task, line_state.tasks[spec.task].next_version)
        added.append((key, False))
        new = ModelVersion(model=model, registered_at=_now(), facts=facts)
        return line_state.with_version(spec.task, new)

    reason = f"{spec.task} from {model.uri}"
    ledger.act(
        "registered",
        actor(),
        f"{reason}; {decisions(accepted)}" if accepted else reason,
        change,
        {"model": model.weights, "config": model.config},
    )
    return added[-1]


def _with_another_try(line_state: LineState, key: ModelKey) -> LineState:
    """Set a model that waited, or that killed its workers, back to `registered`."""
    model = line_state.model(key)
    deadly = model.state == "quarantined" and model.facts.deaths > 0
    if not (deadly or model.state == "waiting"):
        return line_state
    again = model.facts.registered_again + deadly
    facts = model.facts.model_copy(update={"deaths": 0, "registered_again": again})
    return line_state.with_state(*key, "registered", facts=facts)


def _with_expected(line_state: LineState, key: ModelKey, expected: float | None) -> LineState:
    """Note the value that the author measured, if the task file names another one now."""
    model = line_state.model(key)
    if expected is None or expected == model.facts.expected:
        return line_state
    facts = model.facts.model_copy(update={"expected": expected})
    return line_state.with_state(*key, model.state, model.reason, facts=facts)


def _handed_over(
    ledger: Ledger, key: ModelKey, already: bool, wait: bool, timeout: float | None
) -> RegisterOutcome:
    """The result of the workers' run: the present one or, with `wait`, the final one."""
    deadline = None if timeout is None else time.monotonic() + timeout
    report_at, reported = 0.0, ""
    with working(f"waiting for {key.task} version {key.version} to be merged") as show_percent:
        while wait and not _is_decided(ledger, key):
            if ledger.state().is_paused:
                raise _never_merged(ledger, key)
            if deadline is not None and time.monotonic() > deadline:
                raise Unavailable(
                    f"{key.task} version {key.version} is not in the merged model yet",
                    expected=f"within {timeout:.0f} seconds",
                    found=f"it is {ledger.state().model(key).state}",
                    hint="the workers continue: watch them with `restitch status --watch`; "
                    "`restitch doctor` finds what is missing",
                )
            if time.monotonic() >= report_at:
                report_at = time.monotonic() + REPORT_SECONDS
                state = ledger.state().model(key).state
                run, percent = run_progress(ledger.line, key.task, state) or ("no run yet", None)
                message = f"{key.task} version {key.version} is {state}: {run}"
                if message != reported:
                    say(message)
                    reported = message
                if percent is not None:
                    show_percent(round(percent), 100)
            time.sleep(POLL_SECONDS)
    outcome = _outcome(ledger, key, already)
    return replace(outcome, handed_over=True)


def _never_merged(ledger: Ledger, key: ModelKey) -> Unavailable:
    line_state = ledger.state()
    return Unavailable(
        f"line {ledger.line} is paused: {key.task} version {key.version} is registered and waits",
        found=f"paused {line_state.paused}",
        hint=f"restitch resume {ledger.line}; it localizes and merges the model",
    )


def _is_decided(ledger: Ledger, key: ModelKey) -> bool:
    """True if a model is in the champion, or cannot join it before something changes."""
    line_state = ledger.state()
    model = line_state.model(key)
    if model.state == "ready":
        # On a pinned line a model reaches the newest version, but not the champion.
        last = line_state.newest if line_state.pinned else line_state.champion
        return last is not None and _holds(ledger.merged(last), key)
    return model.state != "registered"


def _holds(record: MergedRecord, key: ModelKey) -> bool:
    member = record.members.get(key.task)
    return member is not None and member.version == key.version


def _outcome(
    ledger: Ledger,
    key: ModelKey,
    already: bool,
    onboarded: OnboardOutcome | None = None,
    merged: RemergeOutcome | None = None,
) -> RegisterOutcome:
    line_state = ledger.state()
    model = line_state.model(key)
    if onboarded is None:
        onboarded = OnboardOutcome(ledger.line, *key, model.state, model.reason, False, model.facts)
    record = None if line_state.champion is None else ledger.merged(line_state.champion)
    if record is not None and not _holds(record, key):
        record = None
    return RegisterOutcome(
        replace(onboarded, state=model.state, reason=model.reason),
        already,
        merged,
        paused=line_state.paused if line_state.is_paused else None,
        champion=None if record is None else record.version,
        record=record,
    )
