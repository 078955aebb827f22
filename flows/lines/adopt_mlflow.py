"""Take in finetuned models that were registered in MLflow alone.

Each version of a registered model `<line>.<task>` that is not the image of one of ours is
entered in the head once, by its number there. Its task is described by the version's tag
`restitch.task` (a path or YAML) or else by the task's newest description; where neither can be
used the model is `waiting` with the reason, and is looked at again by every call. What cannot
be read at all is `quarantined`. Whatever a server that is away holds is left for the next call.
"""

import json
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from restitch.flows.audit.report import mirror
from restitch.flows.lines.declare_task import declared_spec, present, resolved
from restitch.merging.errors import BadInput, RestitchError, Unavailable
from restitch.modeling.families.family import get_family
from restitch.registry.access_policy import AccessDenied, check_path
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import UNREAD, LineState, ModelRef, ModelVersion
from restitch.registry.ledger.records import Kind
from restitch.registry.mlflow.external_models import (
    ExternalModel,
    external_model,
    external_models_of,
    has_no_files,
    link,
    task_of,
)
from restitch.registry.mlflow.sync import without_credentials
from restitch.registry.paths import named_path
from restitch.registry.specs.files import parse_task
from restitch.registry.specs.strict_yaml import parse_mapping, read_text
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.inputs.checkpoints import describe_model
from restitch.tasks.inputs.task_data import same_task
from restitch.tasks.runtime.console import say, warn
from restitch.tasks.runtime.workspace import Workspace, actor, workspace

_READ_FROM = ("file", "s3", "models", "runs", "mlflow-artifacts")
_SCHEME = re.compile(r"([A-Za-z][\w+.-]*):/")


@dataclass(frozen=True)
class Adopted:
    """What became of a version that was made in MLflow alone.

    Attributes:
        mlflow_version: MLflow's number; None for a waiting model that MLflow has lost.
        version: the number on the line.
        linked: whether these weights were there already as this version.
    """

    line: str
    task: str
    mlflow_version: int | None
    version: int
    state: str
    reason: str | None
    linked: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class _Described:
    """What describes a model's task.

    Attributes:
        given: the model's own description; without it the task's newest counts.
        lacking: why neither can be used.
    """

    given: TaskSpec | None = None
    lacking: str | None = None


def adopt(line: str) -> tuple[Adopted, ...]:
    """Take in every version that MLflow alone has, and look again at those that wait.

    Returns:
        What was entered or changed by this call.

    Raises:
        Unavailable: MLflow cannot be used.
    """
    space = workspace()
    ledger = space.ledger(line)
    foreign = external_models_of(space.mlflow, line)
    calls = [(f.uri, partial(_take_in, space, ledger, f)) for f in foreign]
    calls += [
        (f"{task} {version}", partial(_look_again, space, ledger, task, version))
        for task, version, _ in ledger.state().in_state("waiting")
    ]
    found = []
    for name, call in calls:
        try:
            found.append(call())
        except RestitchError as error:
            warn(f"{name} cannot be taken in now: {error.message()}")
    if foreign or any(found):
        mirror(line)
    return tuple(adopted for adopted in found if adopted is not None)


def adopt_one(line: str, task: str, mlflow_version: int) -> int | None:
    """Take in one version that an event names.

    Returns:
        Its number on the line; None while it waits.

    Raises:
        BadInput: MLflow has no such version.
        Unavailable: MLflow, or what holds the model, cannot be used.
    """
    space = workspace()
    ledger = space.ledger(line)
    named = task_of(f"{line}.{task}") is not None
    foreign = external_model(space.mlflow, line, task, mlflow_version) if named else None
    if foreign is None:
        raise BadInput(
            f"MLflow has no version {mlflow_version} of {line}.{task}",
            hint="check the name; the schedule finds whatever is there",
        )
    line_state = ledger.state()
    version = line_state.adopted(task, foreign.mlflow) or _image_of(line_state, foreign)
    if version is None:
        _take_in(space, ledger, foreign)
        version = ledger.state().adopted(task, foreign.mlflow)
        if version is None:  # linked
            foreign = external_model(space.mlflow, line, task, mlflow_version)
            version = None if foreign is None else _image_of(ledger.state(), foreign)
    elif line_state.tasks[task].versions[version].state == "waiting":
        _look_again(space, ledger, task, version)
    mirror(line)
    if version is None or ledger.state().tasks[task].versions[version].state == "waiting":
        return None
    return version


def _image_of(line_state: LineState, foreign: ExternalModel) -> int | None:
    versions = line_state.tasks[foreign.task].versions if foreign.task in line_state.tasks else {}
    return foreign.own_version if foreign.own_version in versions else None


def _take_in(space: Workspace, ledger: Ledger, foreign: ExternalModel) -> Adopted | None:
    """Enter a version in the head; None where it is there and only MLflow does not show it."""
    line_state = ledger.state()
    if line_state.adopted(foreign.task, foreign.mlflow) is not None:
        return None
    described = _describe(space, line_state, foreign.task, foreign.task_tag)
    try:
        model = _read(space, line_state, foreign)
    except AccessDenied:
        raise  # another worker may read it, or this one when its list has changed
    except BadInput as error:
        unread = ModelRef(uri=foreign.uri, weights=UNREAD, config=UNREAD)
        refused = ModelVersion(model=unread, state="quarantined", reason=error.message())
        return _enter(ledger, foreign, refused, None)
    if described.lacking is not None:
        waiting = ModelVersion(model=model, state="waiting", reason=described.lacking)
        return _enter(ledger, foreign, waiting, None)
    adopted = _enter(ledger, foreign, ModelVersion(model=model), described.given)
    if adopted is not None and adopted.linked:
        link(space.mlflow, foreign, adopted.version)
    return adopted


def _read(space: Workspace, line_state: LineState, foreign: ExternalModel) -> ModelRef:
    """Fetch a version's files and take their digests."""
    scheme = _SCHEME.match(foreign.source)
    if scheme is not None and scheme[1].lower() not in _READ_FROM:
        raise BadInput(
            f"{foreign.uri} has a source of a kind that is not read",
            expected=f"a folder, or an address of {', '.join(_READ_FROM)}",
            found=f"{scheme[1]}:/...",
        )
    try:
        return describe_model(foreign.uri, get_family(line_state.spec.family), space)
    except RestitchError as error:
        if isinstance(error, Unavailable) and has_no_files(space.mlflow, foreign):
            raise BadInput(
                f"{foreign.uri} holds no safetensors",
                found=f"nothing at {without_credentials(foreign.source)}",
                hint="register a version whose source holds model.safetensors",
            ) from error
        raise
    except Exception as error:  # the libraries of other stores raise whatever they like
        raise Unavailable(
            f"the source of {foreign.uri} cannot be read",
            found=without_credentials(f"{type(error).__name__}: {error}")[:300],
            hint="check its address and the credentials of this worker",
        ) from None


def _enter(
    ledger: Ledger, foreign: ExternalModel, model: ModelVersion, given: TaskSpec | None
) -> Adopted | None:
    """Put a model on the line, unless it is there: from this version or as the same weights."""
    task, entered = foreign.task, list[tuple[int, bool]]()

    def change(line_state: LineState) -> LineState | None:
        entered.clear()
        if line_state.adopted(task, foreign.mlflow) is not None:
            return None
        line_state = (
            _with_described(line_state, given) if given else line_state.with_undeclared(task)
        )
        found = line_state.tasks[task]
        same = present(found, found.spec, model.model) if model.state == "registered" else None
        if same is not None:
            entered.append((same, True))
            return None
        entered.append((found.next_version, False))
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        new = {"registered_at": now, "mlflow": foreign.mlflow}
        return line_state.with_version(task, model.model_copy(update=new))

    kind: Kind = "registered"
    if model.state != "registered":
        kind = "waiting" if model.state == "waiting" else "quarantined"
    reason = f"{task} from {foreign.uri}"
    if model.reason:
        reason += f": {model.reason.splitlines()[0]}"
    digests = {"model": model.model.weights, "config": model.model.config}
    ledger.act(kind, foreign.actor, reason, change, digests)
    if not entered:
        return None
    (version, linked), state = entered[-1], model.state
    if linked:
        state = ledger.state().tasks[task].versions[version].state
        say(f"{foreign.uri} has the same weights as {task} version {version}")
    else:
        tell = say if state == "registered" else warn
        tell(f"{foreign.uri} is {task} version {version}, {state}{_because(model.reason)}")
    number = foreign.mlflow.number
    return Adopted(ledger.line, task, number, version, state, model.reason, linked)


def _look_again(space: Workspace, ledger: Ledger, task: str, version: int) -> Adopted | None:
    """Register a model that waited, where its task is described by now; None while it is not."""
    line_state = ledger.state()
    model = line_state.tasks[task].versions[version]
    tag = None
    if model.mlflow is not None:
        there = external_model(space.mlflow, ledger.line, task, model.mlflow.number)
        if there is not None and there.mlflow == model.mlflow:
            tag = there.task_tag
    described = _describe(space, line_state, task, tag)

    def decided(line_state: LineState) -> tuple[Kind, LineState | None]:
        present_one = line_state.tasks[task].versions[version]
        if present_one.state != "waiting":
            return "waiting", None
        if described.lacking is not None:
            unchanged = present_one.reason == described.lacking
            new = line_state.with_state(task, version, "waiting", described.lacking)
            return "waiting", None if unchanged else new
        if described.given is not None:
            line_state = _with_described(line_state, described.given)
        found = line_state.tasks[task]
        others = {n: v for n, v in found.versions.items() if n != version}
        rest = found.model_copy(update={"versions": others})
        same = present(rest, found.spec, model.model)
        if same is not None:
            reason = f"the same weights as version {same} of the task"
            return "retired", line_state.with_state(task, version, "retired", reason)
        return "registered", line_state.with_state(task, version, "registered")

    kind, changed = decided(line_state)
    if changed is None:
        return None

    def change(line_state: LineState) -> LineState | None:
        again, new = decided(line_state)
        return new if again == kind else None  # the next call looks at what has changed

    act = ledger.act(kind, actor(), f"{task} {version}, which waited", change)
    if act is None:
        return None
    now = act.line_state.tasks[task].versions[version]
    say(f"{task} version {version}, which waited, is {now.state}{_because(now.reason)}")
    number = None if now.mlflow is None else now.mlflow.number
    return Adopted(ledger.line, task, number, version, now.state, now.reason)


def _with_described(line_state: LineState, given: TaskSpec) -> LineState:
    known = declared_spec(line_state, given.task)
    return (
        line_state if known is not None and same_task(known, given) else line_state.with_task(given)
    )


def _describe(space: Workspace, line_state: LineState, task: str, tag: str | None) -> _Described:
    """What describes a model's task: its tag, or what the line knows."""
    if tag is None:
        if declared_spec(line_state, task) is not None:
            return _Described()
        return _Described(
            lacking=f"nobody has described the task {task}: run `restitch task {line_state.line} "
            "--task FILE`, or give the version the tag restitch.task"
        )
    try:
        return _Described(
            resolved(space, line_state, _parsed(task, tag.strip()), replace_task=True)
        )
    except BadInput as error:
        return _Described(lacking=f"its tag restitch.task cannot be used: {error.message()}")


def _parsed(task: str, tag: str) -> TaskSpec:
    """The task that a tag describes: the file at a path, or the tag itself."""
    origin, text, folder = "the tag restitch.task", tag, Path("/")
    if "\n" not in tag and (tag.startswith("/") or _SCHEME.match(tag)):
        try:
            parts = urlsplit(tag)
        except ValueError as error:
            raise BadInput(f"{origin} is no address", found=error) from error
        if parts.scheme not in ("", "file"):
            raise BadInput(
                f"{origin} is an address of a kind that is not read",
                expected="an absolute path, file:///PATH, or the YAML itself",
                found=f"{parts.scheme}:/...",
            )
        path = named_path(unquote(parts.path) if parts.scheme else tag, None, origin)
        check_path(path, origin)
        origin, text, folder = str(path), read_text(path, "task file"), path.parent
    values = parse_mapping(text, origin)
    if values.setdefault("task", task) != task:
        raise BadInput(
            f"{origin} describes another task", expected=f"task: {task}", found=values["task"]
        )
    return parse_task(json.dumps(values), origin, folder)


def _because(reason: str | None) -> str:
    return f": {reason}" if reason else ""
