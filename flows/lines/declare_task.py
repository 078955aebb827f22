"""Declare a task without a model, and check the descriptions of tasks.

Models that are registered in MLflow only use the newest description of their task, and wait if
there is none. Declaring the same task again changes nothing. Another description for the same name
needs `--replace-task`; members stay, and later evaluations use the new description.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from restitch.flows.audit.report import mirror
from restitch.flows.outcome import Outcome
from restitch.merging.errors import BadInput
from restitch.merging.methods.registry import get_method
from restitch.modeling.families.family import get_family
from restitch.registry.ledger.finetuned_models import ModelRef, State, Task
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import LineState
from restitch.registry.specs.files import load_task
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.inputs.checkpoints import open_base
from restitch.tasks.inputs.heads import check_own_head, check_task_head, with_labels
from restitch.tasks.inputs.reported_rows import check_some_are_left
from restitch.tasks.inputs.task_data import (
    Remember,
    check_fits,
    check_rows,
    resolve_task,
    same_task,
)
from restitch.tasks.runtime.console import say
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.workspace import Workspace, actor, workspace
from restitch.tasks.statistics import check_rows_for

_TAKES_PART: tuple[State, ...] = ("registered", "waiting", "ready")


@dataclass(frozen=True)
class TaskOutcome(Outcome):
    """The result of a declaration.

    Attributes:
        waiting: the versions of the task that wait; the next remerge registers them.
    """

    line: str
    task: str
    action: Literal["declared", "changed", "unchanged"]
    waiting: tuple[int, ...]


def declare_task(line: str, task_file: Path, *, replace_task: bool = False) -> TaskOutcome:
    """Declare a task of a line, or update it from its changed file.

    Raises:
        BadInput: the file or its data cannot be read, or the file changes the task and
            `replace_task` is off. The line stays as it was.
    """
    ledger = workspace().ledger(line)
    spec, remember = resolve_spec(ledger, task_file, replace_task)
    _check_newest_model(ledger.state(), spec)
    remember()
    before = declared_spec(ledger.state(), spec.task)

    def change(line_state: LineState) -> LineState | None:
        known = declared_spec(line_state, spec.task)
        if known is not None:
            refuse_another(line, known, spec, replace_task)
            same = same_task(known, spec) and known.expected == spec.expected
            if known == spec or (same and not replace_task):
                return None
        return line_state.with_task(spec)

    new = before is None
    reason = f"task {spec.task} is {'declared' if new else 'changed'}"
    act = ledger.act("configured", actor(), reason, change, {"task": spec.digest})
    if act is None:
        say(f"task {spec.task} is already declared with this description")
    mirror(line)
    versions = ledger.state().tasks[spec.task].versions
    return TaskOutcome(
        line,
        spec.task,
        "unchanged" if act is None else "declared" if new else "changed",
        tuple(sorted(n for n, v in versions.items() if v.state == "waiting")),
    )


def _check_newest_model(line_state: LineState, spec: TaskSpec) -> None:
    """Refuse classes that the head of the task's newest model does not have.

    Raises:
        BadInput: it has other classes, so the line could not measure the model any more.
    """
    versions = line_state.tasks[spec.task].versions if spec.task in line_state.tasks else {}
    taking_part = [number for number, one in versions.items() if one.state in _TAKES_PART]
    if taking_part and get_family(line_state.spec.family).task_heads is not None:
        base = open_base(LineRef(line_state.spec, line_state.base), workspace())
        check_task_head(spec, base, versions[max(taking_part)].model, workspace())


def resolve_spec(
    ledger: Ledger, task: Path | TaskSpec, replace_task: bool, model: str | None = None
) -> tuple[TaskSpec, Remember]:
    """Load a task's file, complete it for the line, and check that its rows can be read.

    Args:
        ledger: of the line.
        task: the file, or what it says.
        replace_task: allow the file to change the task.
        model: a finetuned model of the task, which may name its classes.

    Returns:
        The task, and a call that remembers in the store that its rows were checked.

    Raises:
        BadInput: the file or its data cannot be used, or the file changes the line's task of
            this name and `replace_task` is off.
    """
    spec = load_task(task) if isinstance(task, Path) else task
    return resolved(workspace(), ledger.state(), spec, replace_task, model)


def resolved(
    space: Workspace,
    line_state: LineState,
    spec: TaskSpec,
    replace_task: bool,
    model: str | None = None,
) -> tuple[TaskSpec, Remember]:
    """Complete a loaded task for a line; takes, returns and raises as `resolve_spec`."""
    known = declared_spec(line_state, spec.task)
    if known is not None:
        spec = spec.with_pins_of(known)
    family = get_family(line_state.spec.family)
    is_benchmark = spec.task == line_state.spec.retention
    named = line_state.base.uri if is_benchmark and model is None else model
    spec = resolve_task(with_labels(spec, known, family, named, space), family)
    if known is not None:
        refuse_another(line_state.line, known, spec, replace_task)
    methods = [get_method(one.name) for one in line_state.spec.method.methods]
    for method in methods:
        check_rows_for(method, [spec])
    calibrated = any(method.needs for method in methods)
    localize = line_state.spec.localize
    remember = check_rows(
        spec, family, space, localize, calibrated=calibrated, chosen=len(methods) > 1
    )
    if len(methods) > 1:
        check_some_are_left(spec, family)
    if spec.data is not None:
        base = open_base(LineRef(line_state.spec, line_state.base), space)
        check_fits(spec, base)
        if is_benchmark:
            check_own_head(spec.task, spec, base)
    return spec, remember


def declared_spec(line_state: LineState, task: str) -> TaskSpec | None:
    """The newest description of a task; None if there is none."""
    known = line_state.tasks.get(task)
    return known.spec if known is not None and known.declared else None


def refuse_another(line: str, known: TaskSpec, spec: TaskSpec, replace_task: bool) -> None:
    """Refuse a changed description of a task, unless the change was asked for.

    Raises:
        BadInput: the description differs.
    """
    if replace_task or same_task(known, spec):
        return
    old, new = known.to_json(), spec.to_json()
    raise BadInput(
        f"task {spec.task} of line {line} already has another description",
        expected="the same data, head and metric as before",
        found=f"differs in: {', '.join(k for k in old if old[k] != new[k] and k != 'expected')}",
        hint="use another task name, or change the task with --replace-task",
    )


def present(task: Task, spec: TaskSpec, model: ModelRef) -> int | None:
    """The version of a task that already holds this model for the same task, if it still counts.

    Only two versions count: the newest one that is neither retired nor forgotten, and the newest
    one that takes part in merges, which a later quarantined or held one does not replace.
    """
    left = ("retired", "forgotten")
    numbers = {
        max((n for n, v in task.versions.items() if v.state not in left), default=0),
        max((n for n, v in task.versions.items() if v.state in _TAKES_PART), default=0),
    } - {0}
    same = [
        number
        for number in numbers
        if task.versions[number].model.weights == model.weights
        and task.versions[number].model.config == model.config
    ]
    # The first description of a task is for the models that wait for it.
    means_the_same = not task.declared or same_task(task.spec, spec)
    return max(same) if same and means_the_same else None
