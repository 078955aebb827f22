"""Register a finetuned model and see it into the merged model.

    enter it in the head --> with workers: tell them, and wait for what becomes of it if asked
                         --> without: onboard and remerge here

The same weights with the same task are registered once: what is unfinished about them is
finished. Other weights become the task's next version.
"""

import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from restitch.flows.audit.report import mirror
from restitch.flows.lines.declare_task import present, resolve_spec
from restitch.flows.onboard import OnboardOutcome, onboard
from restitch.flows.remerge import RemergeOutcome, remerge
from restitch.merging.errors import CannotJoin, GateFailed, Unavailable
from restitch.modeling.families.family import get_family
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import LineState, ModelRef, ModelVersion
from restitch.registry.ledger.records import MergedRecord
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.inputs.checkpoints import describe_model, open_base
from restitch.tasks.inputs.task_data import same_task
from restitch.tasks.runtime.console import say, working
from restitch.tasks.runtime.events import MODEL_REGISTERED, announce, has_workers
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.run_progress import run_progress
from restitch.tasks.runtime.workspace import actor, workspace

LOOK_EVERY_SECONDS, REPORT_EVERY_SECONDS = 0.5, 2.0


@dataclass(frozen=True)
class RegisterOutcome:
    """What became of a registration.

    Attributes:
        already: whether these weights were registered for this task before.
        merged: what the remerge of this process did; None where none was made.
        handed_over: whether workers do the work.
        champion: the version of the champion that holds the model; None where none does yet.
        record: that version's record.
    """

    onboarded: OnboardOutcome
    already: bool
    merged: RemergeOutcome | None = None
    handed_over: bool = False
    champion: int | None = None
    record: MergedRecord | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **self.onboarded.as_dict(),
            "already": self.already,
            "merged": None if self.merged is None else self.merged.as_dict(),
            "handed_over": self.handed_over,
            "champion": self.champion,
            "record": None if self.record is None else self.record.to_json(),
        }

    @property
    def exit_code(self) -> int:
        """0, or why this model is not in the merged model."""
        if self.onboarded.state == "quarantined":
            return CannotJoin.exit_code
        return GateFailed.exit_code if self.onboarded.state == "held" else 0


def register(
    line: str,
    task_file: Path,
    source: str,
    *,
    merge: bool = True,
    replace_task: bool = False,
    copy: bool = False,
    here: bool = False,
    wait: bool = False,
    timeout: float | None = None,
) -> RegisterOutcome:
    """Register a finetuned model; without workers, onboard it here.

    Args:
        line: the line's name.
        task_file: the task's description.
        source: where the model is: a folder, a hub id or an MLflow address.
        merge: see it into the merged model; without, only onboard it.
        replace_task: accept another description of the task.
        copy: keep a copy of the model's files in the store.
        here: do the work in this process although there are workers.
        wait: with workers, return when the model is in the champion, or cannot be.
        timeout: how many seconds to wait at most.

    Raises:
        BadInput: the task file, its data or the model cannot be read, or the task has another
            file and `replace_task` is off. Nothing is changed then.
        Unavailable: a server is away, or the wait was too long; the model stays registered.
    """
    space = workspace()
    ledger = space.ledger(line)
    line_state = ledger.state()
    spec = resolve_spec(ledger, task_file, replace_task)
    open_base(LineRef(line_state.spec, line_state.base), space)  # without it nothing can join
    model = describe_model(source, get_family(line_state.spec.family), space, copy=copy)
    version, already = _enter(ledger, spec, model, replace_task)
    if already:
        say(f"{spec.task}: already version {version}")
    if not here and has_workers():
        if _state(ledger, spec.task, version) == "registered":
            announce(MODEL_REGISTERED, line, spec.task, version)
        mirror(line)
        return _handed_over(ledger, spec.task, version, already, wait, timeout)
    mirror(line)
    onboarded = onboard(line, spec.task, version)
    merged = None
    if merge and onboarded.state in ("ready", "held"):
        merged = remerge(line)
    return _outcome(ledger, spec.task, version, already, onboarded, merged)


def _enter(ledger: Ledger, spec: TaskSpec, model: ModelRef, replace_task: bool) -> tuple[int, bool]:
    """Put the model on the line as its task's next version, unless it is there already.

    Returns:
        Its version, and whether that was there before.
    """
    entered: list[tuple[int, bool]] = []

    def change(line_state: LineState) -> LineState | None:
        entered.clear()
        task = line_state.tasks.get(spec.task)
        found = None if task is None else present(task, spec, model)
        if task is not None and found is not None:
            entered.append((found, True))
            # The same task from another place: what was said when the old place is gone.
            described = (replace_task and spec != task.spec) or not task.declared
            after = line_state.with_task(spec) if described else line_state
            after = _tried_again(after, spec.task, found)
            return None if after is line_state else after
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        if task is None or not task.declared or not same_task(task.spec, spec):
            line_state = line_state.with_task(spec)
        entered.append((line_state.tasks[spec.task].next_version, False))
        return line_state.with_version(spec.task, ModelVersion(model=model, registered_at=now))

    ledger.act(
        "registered",
        actor(),
        f"{spec.task} from {model.uri}",
        change,
        {"model": model.weights, "config": model.config},
    )
    return entered[-1]


def _tried_again(line_state: LineState, task: str, version: int) -> LineState:
    """The head with a model that waited, or that killed its workers, registered anew."""
    model = line_state.tasks[task].versions[version]
    deadly = model.state == "quarantined" and model.facts.deaths > 0
    if not (deadly or model.state == "waiting"):
        return line_state
    again = model.facts.registered_again + deadly
    facts = model.facts.model_copy(update={"deaths": 0, "registered_again": again})
    return line_state.with_state(task, version, "registered", facts=facts)


def _handed_over(
    ledger: Ledger, task: str, version: int, already: bool, wait: bool, timeout: float | None
) -> RegisterOutcome:
    """What workers make of a model: at once, or when it is decided."""
    deadline = None if timeout is None else time.monotonic() + timeout
    report_at, reported = 0.0, ""
    with working(f"waiting for {task} version {version} to be merged") as show_percent:
        while wait and not _is_decided(ledger.state(), ledger, task, version):
            if deadline is not None and time.monotonic() > deadline:
                raise Unavailable(
                    f"{task} version {version} is not in the merged model yet",
                    expected=f"within {timeout:.0f} seconds",
                    found=f"it is {_state(ledger, task, version)}",
                    hint="nothing is lost: `restitch status --watch` follows it, "
                    "`restitch doctor` tells what is missing",
                )
            if time.monotonic() >= report_at:
                report_at = time.monotonic() + REPORT_EVERY_SECONDS
                state = _state(ledger, task, version)
                run, percent = run_progress(ledger.line, task, state) or ("no run yet", None)
                message = f"{task} version {version} is {state}: {run}"
                if message != reported:
                    say(message)
                    reported = message
                if percent is not None:
                    show_percent(round(percent), 100)
            time.sleep(LOOK_EVERY_SECONDS)
    outcome = _outcome(ledger, task, version, already)
    return replace(outcome, handed_over=True)


def _is_decided(line_state: LineState, ledger: Ledger, task: str, version: int) -> bool:
    """Whether a model is in the champion, or will not be without something new."""
    model = line_state.tasks[task].versions[version]
    if model.state == "ready":
        # Where promotion is switched off, the newest version is as far as it goes.
        last = line_state.newest if line_state.pinned else line_state.champion
        return last is not None and _holds(ledger.merged(last), task, version)
    return model.state != "registered"


def _holds(record: MergedRecord, task: str, version: int) -> bool:
    member = record.members.get(task)
    return member is not None and member.version == version


def _outcome(
    ledger: Ledger,
    task: str,
    version: int,
    already: bool,
    onboarded: OnboardOutcome | None = None,
    merged: RemergeOutcome | None = None,
) -> RegisterOutcome:
    line_state = ledger.state()
    model = line_state.tasks[task].versions[version]
    if onboarded is None:
        onboarded = OnboardOutcome(
            ledger.line, task, version, model.state, model.reason, False, model.facts
        )
    record = None if line_state.champion is None else ledger.merged(line_state.champion)
    if record is not None and not _holds(record, task, version):
        record = None
    return RegisterOutcome(
        replace(onboarded, state=model.state, reason=model.reason),
        already,
        merged,
        champion=None if record is None else record.version,
        record=record,
    )


def _state(ledger: Ledger, task: str, version: int) -> str:
    return ledger.state().tasks[task].versions[version].state
