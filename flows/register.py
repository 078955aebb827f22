"""Register a finetuned model and see it into the merged model.

The same weights with the same task are registered once: what is unfinished about them is
finished. Other weights become the task's next version.
"""

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows.onboard import OnboardOutcome, onboard
from flows.remerge import RemergeOutcome, remerge
from merging.errors import BadInput, CannotJoin, GateFailed
from modeling.family import get_family
from registry.head import Head, ModelRef, ModelVersion, State, Task
from registry.ledger import Ledger
from registry.specs import TaskSpec, load_task
from tasks.inputs import check_rows, resolve_task, same_task
from tasks.models import describe_model, open_base
from tasks.publish import mirror
from tasks.refs import LineRef
from tasks.reporting import say
from tasks.workspace import actor, workspace

_TAKES_PART: tuple[State, ...] = ("registered", "waiting", "ready")


@dataclass(frozen=True)
class RegisterOutcome:
    """What became of a registration.

    Attributes:
        already: whether these weights were registered for this task before.
        merged: what the remerge did; None where none was made.
    """

    onboarded: OnboardOutcome
    already: bool
    merged: RemergeOutcome | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **self.onboarded.as_dict(),
            "already": self.already,
            "merged": None if self.merged is None else self.merged.as_dict(),
        }

    @property
    def exit_code(self) -> int:
        """0, or why this model is not in the merged model."""
        if self.onboarded.state == "quarantined":
            return CannotJoin.exit_code
        return GateFailed.exit_code if self.onboarded.state == "held" else 0


def register(
    line: str, task_file: Path, source: str, *, merge: bool = True, replace_task: bool = False
) -> RegisterOutcome:
    """Register a finetuned model; with `merge`, return when it is in the merged model.

    Raises:
        BadInput: the task file, its data or the model cannot be read, or the task has another
            file and `replace_task` is off. Nothing is changed then.
    """
    space = workspace()
    ledger = space.ledger(line)
    head = ledger.head()
    spec = load_task(task_file)
    known = head.tasks.get(spec.task)
    if known is not None:
        spec = spec.with_pins_of(known.spec)
    family = get_family(head.spec.family)
    spec = resolve_task(spec, family)
    if known is not None and not same_task(known.spec, spec) and not replace_task:
        raise BadInput(
            f"task {spec.task} of line {line} was registered with another task file",
            expected="the same data, head and metric",
            found=", ".join(_differing(known.spec, spec)),
            hint="use another task name, or --replace-task to change the task",
        )
    check_rows(spec, family, space, head.spec.localize)
    open_base(LineRef(head.spec, head.base), space)  # without it nothing can join
    model = describe_model(source, family, space)
    version, already = _enter(ledger, spec, model, replace_task)
    mirror(line)
    if already:
        say(f"{spec.task}: already version {version}")
    onboarded = onboard(line, spec.task, version)
    merged = None
    if merge and onboarded.state in ("ready", "held"):
        merged = remerge(line)
        onboarded = _after(ledger, onboarded)
    return RegisterOutcome(onboarded, already, merged)


def _enter(ledger: Ledger, spec: TaskSpec, model: ModelRef, replace_task: bool) -> tuple[int, bool]:
    """Put the model on the line as its task's next version, unless it is there already.

    Returns:
        Its version, and whether that was there before.
    """
    entered: list[tuple[int, bool]] = []

    def change(head: Head) -> Head | None:
        entered.clear()
        task = head.tasks.get(spec.task)
        found = None if task is None else _present(task, spec, model)
        if task is not None and found is not None:
            entered.append((found, True))
            # The same task from another place: what was said when the old place is gone.
            return head.with_task(spec) if replace_task and spec != task.spec else None
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        if task is None or not same_task(task.spec, spec):
            head = head.with_task(spec)
        entered.append((head.tasks[spec.task].next_version, False))
        return head.with_version(spec.task, ModelVersion(model=model, registered_at=now))

    ledger.act(
        "registered",
        actor(),
        f"{spec.task} from {model.uri}",
        change,
        {"model": model.weights, "config": model.config},
    )
    return entered[-1]


def _present(task: Task, spec: TaskSpec, model: ModelRef) -> int | None:
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
    return max(same) if same and same_task(task.spec, spec) else None


def _after(ledger: Ledger, before: OnboardOutcome) -> OnboardOutcome:
    model = ledger.head().tasks[before.task].versions[before.version]
    return replace(before, state=model.state, reason=model.reason)


def _differing(old: TaskSpec, new: TaskSpec) -> list[str]:
    ours, theirs = old.to_json(), new.to_json()
    return [f"another {key}" for key in ours if ours[key] != theirs[key]]
