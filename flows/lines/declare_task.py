"""Declare a task without a model, and the checks that every description of a task passes.

Models that are registered in MLflow alone use the newest description of their task, and wait
where there is none. Declaring the same again changes nothing. Another description for a name
is refused unless it is asked for; models that have joined stay as they are, and whatever is
measured next is measured by the new description.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from restitch.flows.audit.report import mirror
from restitch.merging.errors import BadInput
from restitch.merging.methods.registry import get_method
from restitch.modeling.families.family import get_family
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import LineState, ModelRef, State, Task
from restitch.registry.specs.files import load_task
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.inputs.task_data import check_rows, resolve_task, same_task
from restitch.tasks.runtime.console import say
from restitch.tasks.runtime.workspace import Workspace, actor, workspace
from restitch.tasks.statistics import check_rows_for

_TAKES_PART: tuple[State, ...] = ("registered", "waiting", "ready")


@dataclass(frozen=True)
class TaskOutcome:
    """What became of a declaration.

    Attributes:
        action: declared (new), changed, or unchanged.
        waiting: the versions of the task that wait, and that the next remerge looks at.
    """

    line: str
    task: str
    action: Literal["declared", "changed", "unchanged"]
    waiting: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def declare_task(line: str, task_file: Path, *, replace_task: bool = False) -> TaskOutcome:
    """Declare a task of a line, or bring it to what its file says now.

    Raises:
        BadInput: the file or its data cannot be read, or the task has another description and
            `replace_task` is off. Nothing is changed then.
    """
    ledger = workspace().ledger(line)
    spec = resolve_spec(ledger, task_file, replace_task)
    before = declared_spec(ledger.state(), spec.task)

    def change(line_state: LineState) -> LineState | None:
        known = declared_spec(line_state, spec.task)
        if known is not None:
            refuse_another(line, known, spec, replace_task)
            if known == spec or (same_task(known, spec) and not replace_task):
                return None
        return line_state.with_task(spec)

    new = before is None
    reason = f"task {spec.task} is {'declared' if new else 'described anew'}"
    act = ledger.act("configured", actor(), reason, change, {"task": spec.digest})
    if act is None:
        say(f"task {spec.task} is already declared like this")
    mirror(line)
    versions = ledger.state().tasks[spec.task].versions
    return TaskOutcome(
        line,
        spec.task,
        "unchanged" if act is None else "declared" if new else "changed",
        tuple(sorted(n for n, v in versions.items() if v.state == "waiting")),
    )


def resolve_spec(ledger: Ledger, task_file: Path, replace_task: bool) -> TaskSpec:
    """The task that a file describes, made whole, with rows that can be read.

    Raises:
        BadInput: the file or its data cannot be used, or the line's task of this name is
            described in another way and `replace_task` is off.
    """
    return resolved(workspace(), ledger.state(), load_task(task_file), replace_task)


def resolved(
    space: Workspace, line_state: LineState, spec: TaskSpec, replace_task: bool
) -> TaskSpec:
    """A loaded task made whole for a line; raises like `resolve_spec`."""
    known = declared_spec(line_state, spec.task)
    if known is not None:
        spec = spec.with_pins_of(known)
    family = get_family(line_state.spec.family)
    spec = resolve_task(spec, family)
    if known is not None:
        refuse_another(line_state.line, known, spec, replace_task)
    methods = [get_method(one.name) for one in line_state.spec.method.methods]
    for method in methods:
        check_rows_for(method, [spec])
    calibrated = any(method.needs for method in methods)
    check_rows(spec, family, space, line_state.spec.localize, calibrated=calibrated)
    return spec


def declared_spec(line_state: LineState, task: str) -> TaskSpec | None:
    """The newest description of a task; None where nobody has given one."""
    found = line_state.tasks.get(task)
    return found.spec if found is not None and found.declared else None


def refuse_another(line: str, known: TaskSpec, spec: TaskSpec, replace_task: bool) -> None:
    """Refuse another description of a task, unless it was asked for.

    Raises:
        BadInput: it is another one.
    """
    if replace_task or same_task(known, spec):
        return
    ours, theirs = known.to_json(), spec.to_json()
    raise BadInput(
        f"task {spec.task} of line {line} was registered with another task file",
        expected="the same data, head and metric",
        found=", ".join(f"another {key}" for key in ours if ours[key] != theirs[key]),
        hint="use another task name, or --replace-task to change the task",
    )


def present(task: Task, spec: TaskSpec, model: ModelRef) -> int | None:
    """The version that is this very model for this very task, and that counts today.

    It is the newest one, whatever became of it, or the newest one that takes part: what was
    quarantined or held after it does not take its place.
    """
    numbers = {
        max((n for n, v in task.versions.items() if v.state != "retired"), default=0),
        max((n for n, v in task.versions.items() if v.state in _TAKES_PART), default=0),
    } - {0}
    same = [
        number
        for number in numbers
        if task.versions[number].model.weights == model.weights
        and task.versions[number].model.config == model.config
    ]
    # Whoever describes a task that waited for it means the models that wait.
    means_the_same = not task.declared or same_task(task.spec, spec)
    return max(same) if same and means_the_same else None
