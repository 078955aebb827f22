"""Adopt finetuned models that were registered in MLflow only.

Each version of a registered model `<line>.<task>` that is no projection of one of our models is
added to the line once. The version's tag `restitch.task` (a path or YAML) describes its task, or
else the task's newest description does. If neither can be used, the model is `waiting` with the
reason, and each call tries it again. A model that cannot be read is `quarantined`. If a server is
away, its models are left for the next call.
"""

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import cast
from urllib.parse import unquote, urlsplit

from restitch.flows.audit.report import mirror
from restitch.flows.lines.declare_task import declared_spec, present, resolved
from restitch.merging.errors import BadInput, RestitchError, Unavailable
from restitch.modeling.families.family import get_family
from restitch.registry.access_policy import AccessDenied, check_path
from restitch.registry.ledger.finetuned_models import (
    NO_GAIN,
    UNREAD,
    ModelFacts,
    ModelKey,
    ModelRef,
    ModelVersion,
)
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.measurements import Acceptance, decisions
from restitch.registry.ledger.records import Kind
from restitch.registry.mlflow.external_models import (
    ExternalModel,
    external_model,
    external_models_of,
    has_no_files,
    link,
    task_of,
)
from restitch.registry.mlflow.projection import ACCEPT_TAG
from restitch.registry.paths import named_path
from restitch.registry.redaction import without_credentials
from restitch.registry.specs.files import parse_task
from restitch.registry.specs.strict_yaml import parse_mapping, read_text
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.inputs.checkpoints import describe_model
from restitch.tasks.inputs.task_data import same_task
from restitch.tasks.runtime.console import say, warn
from restitch.tasks.runtime.notify import notify
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.workspace import Workspace, actor, workspace

_READ_FROM = ("file", "s3", "models", "runs", "mlflow-artifacts")
_SCHEME = re.compile(r"([A-Za-z][\w+.-]*):/")


@dataclass(frozen=True)
class Adopted:
    """A version that was made in MLflow only, as a version of the line.

    Attributes:
        linked: whether the line already had these weights as this version.
    """

    task: str
    version: int
    state: str
    reason: str | None
    linked: bool = False


@dataclass(frozen=True)
class _Description:
    """The model's own description, None for that of its task, or why neither can be used."""

    own: TaskSpec | None = None
    problem: str | None = None


def adopt(line: str) -> tuple[Adopted, ...]:
    """Adopt every version that only MLflow has, and try waiting models again.

    Returns:
        The models that this call added or changed.

    Raises:
        Unavailable: MLflow cannot be used.
    """
    space = workspace()
    ledger = space.ledger(line)
    external = external_models_of(space.mlflow, line)
    calls = [(each.uri, partial(_adopt, space, ledger, each)) for each in external]
    line_state = ledger.state()
    waiting = line_state.in_state("waiting")
    calls += [(str(key), partial(_retry, space, ledger, key)) for key, _ in waiting]
    calls += [
        (str(key), partial(_accept, space, ledger, key))
        for key, model in line_state.in_state("held")
        if model.mlflow is not None and model.facts.lacks_gain
    ]
    results = []
    for name, call in calls:
        try:
            results.append(call())
        except RestitchError as error:
            warn(f"{name} is not adopted now: {error.message()}")
    if external or any(results):
        mirror(line)
    return tuple(adopted for adopted in results if adopted is not None)


def adopt_one(line: str, task: str, mlflow_version: int) -> int | None:
    """Adopt one version that an event names.

    Returns:
        Its number on the line; None while it waits.

    Raises:
        BadInput: MLflow has no such version.
        Unavailable: MLflow or the storage of the model is away.
    """
    space = workspace()
    ledger = space.ledger(line)
    named = task_of(f"{line}.{task}") is not None
    external = external_model(space.mlflow, line, task, mlflow_version) if named else None
    if external is None:
        raise BadInput(
            f"MLflow has no version {mlflow_version} of {line}.{task}",
            expected="a version of a model that is registered as LINE.TASK",
            hint="check the name and the number in MLflow",
        )
    line_state = ledger.state()
    version = line_state.adopted(task, external.mlflow) or _own_version(line_state, external)
    if version is None:
        _adopt(space, ledger, external)
        version = ledger.state().adopted(task, external.mlflow)
        if version is None:  # linked
            external = external_model(space.mlflow, line, task, mlflow_version)
            version = None if external is None else _own_version(ledger.state(), external)
    elif line_state.tasks[task].versions[version].state == "waiting":
        _retry(space, ledger, ModelKey(task, version))
    mirror(line)
    if version is None or ledger.state().tasks[task].versions[version].state == "waiting":
        return None
    return version


def _own_version(line_state: LineState, external: ExternalModel) -> int | None:
    versions = line_state.tasks[external.task].versions if external.task in line_state.tasks else {}
    return external.own_version if external.own_version in versions else None


def _adopt(space: Workspace, ledger: Ledger, external: ExternalModel) -> Adopted | None:
    """Add a version to the line; None if the line has it already."""
    line_state = ledger.state()
    if line_state.adopted(external.task, external.mlflow) is not None:
        return None
    description = _describe(space, line_state, external.task, external.task_tag)
    try:
        model = _read(space, line_state, external)
    except AccessDenied:
        raise  # another worker may read it, or this one with other settings
    except BadInput as error:
        unread = ModelRef(uri=external.uri, weights=UNREAD, config=UNREAD)
        refused = ModelVersion(model=unread, state="quarantined", reason=error.message())
        return _add(ledger, external, refused, None)
    if description.problem is not None:
        waiting = ModelVersion(model=model, state="waiting", reason=description.problem)
        return _add(ledger, external, waiting, None)
    facts = _own_facts(description.own or line_state.tasks[external.task].spec, external)
    adopted = _add(ledger, external, ModelVersion(model=model, facts=facts), description.own)
    if adopted is not None and adopted.linked:
        link(space.mlflow, external, adopted.version)
    return adopted


def _read(space: Workspace, line_state: LineState, external: ExternalModel) -> ModelRef:
    """Fetch a version's files and take their digests."""
    scheme = _SCHEME.match(external.source)
    if scheme is not None and scheme[1].lower() not in _READ_FROM:
        raise BadInput(
            f"the source of {external.uri} cannot be read",
            expected=f"a folder, or an address with {', '.join(_READ_FROM)}",
            found=f"an address with {scheme[1]}:/",
            hint="register a version whose source is of one of these kinds",
        )
    try:
        line = LineRef(line_state.spec, line_state.base)
        return describe_model(external.uri, get_family(line_state.spec.family), space, line=line)
    except RestitchError as error:
        if isinstance(error, Unavailable) and has_no_files(space.mlflow, external):
            raise BadInput(
                f"{external.uri} holds no safetensors",
                expected="a source with model.safetensors",
                found=f"nothing at {without_credentials(external.source)}",
                hint="save the model with safetensors, and register it as a new version",
            ) from error
        raise
    except Exception as error:  # libraries of other stores raise errors of any type
        raise Unavailable(
            f"the source of {external.uri} cannot be read",
            found=without_credentials(f"{type(error).__name__}: {error}")[:300],
            hint="check its address and the credentials of this worker",
        ) from None


def _add(
    ledger: Ledger, external: ExternalModel, model: ModelVersion, description: TaskSpec | None
) -> Adopted | None:
    """Add a model to the line, unless it has this version or the same weights already."""
    task, added = external.task, list[tuple[int, bool]]()

    def change(line_state: LineState) -> LineState | None:
        added.clear()
        if line_state.adopted(task, external.mlflow) is not None:
            return None
        if description is None:
            line_state = line_state.with_undeclared(task)
        else:
            line_state = _with_description(line_state, description)
        known = line_state.tasks[task]
        same = present(known, known.spec, model.model) if model.state == "registered" else None
        if same is not None:
            added.append((same, True))
            after = line_state.with_accepted(ModelKey(task, same), model.facts.accepted)
            return None if after is line_state else after
        added.append((known.next_version, False))
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        new = {"registered_at": now, "mlflow": external.mlflow}
        return line_state.with_version(task, model.model_copy(update=new))

    kind = cast(Kind, model.state)  # the act that begins a state has its name
    reason = f"{task} from {external.uri}"
    if model.reason:
        reason += f": {model.reason.splitlines()[0]}"
    if model.facts.accepted:
        reason += f"; {decisions(model.facts.accepted)}"
    digests = {"model": model.model.weights, "config": model.model.config}
    notify(ledger.act(kind, external.actor, reason, change, digests))
    if not added:
        return None
    (version, linked), state = added[-1], model.state
    if linked:
        state = ledger.state().tasks[task].versions[version].state
        say(f"{external.uri} has the same weights as {task} version {version}")
    else:
        report = say if state == "registered" else warn
        report(f"{external.uri} is {task} version {version}, {state}{_because(model.reason)}")
    return Adopted(task, version, state, model.reason, linked)


def _retry(space: Workspace, ledger: Ledger, key: ModelKey) -> Adopted | None:
    """Register a waiting model if its task is described now; None if nothing changes."""
    line_state = ledger.state()
    model = line_state.model(key)
    shown = _external(space, ledger, key)
    tag = None if shown is None else shown.task_tag
    description = _describe(space, line_state, key.task, tag)
    own = _own_facts(description.own or line_state.tasks[key.task].spec, shown)
    noted = {"expected": own.expected, "accepted": own.accepted}

    def decide(line_state: LineState) -> tuple[Kind, LineState | None]:
        current = line_state.model(key)
        if current.state != "waiting":
            return "waiting", None
        if description.problem is not None:
            unchanged = current.reason == description.problem
            new = line_state.with_state(*key, "waiting", description.problem)
            return "waiting", None if unchanged else new
        if description.own is not None:
            line_state = _with_description(line_state, description.own)
        known = line_state.tasks[key.task]
        others = {n: v for n, v in known.versions.items() if n != key.version}
        rest = known.model_copy(update={"versions": others})
        same = present(rest, known.spec, model.model)
        if same is not None:
            reason = f"the same weights as version {same} of the task"
            return "retired", line_state.with_state(*key, "retired", reason)
        facts = current.facts.model_copy(update=noted)
        return "registered", line_state.with_state(*key, "registered", facts=facts)

    kind, changed = decide(line_state)
    if changed is None:
        return None

    def change(line_state: LineState) -> LineState | None:
        current_kind, new = decide(line_state)
        return new if current_kind == kind else None  # otherwise the next call tries again

    act = ledger.act(kind, actor(), f"{key}, which waited", change)
    if act is None:
        return None
    now = act.line_state.model(key)
    say(f"{key.task} version {key.version}, which waited, is {now.state}{_because(now.reason)}")
    return Adopted(*key, now.state, now.reason)


def _accept(space: Workspace, ledger: Ledger, key: ModelKey) -> Adopted | None:
    """Register a model that is held for its missing gain again, if a tag accepts it now."""
    accepted = _accepted(_external(space, ledger, key))
    if not accepted:
        return None

    def change(line_state: LineState) -> LineState | None:
        after = line_state.with_accepted(key, accepted)
        return None if after is line_state else after

    act = ledger.act("registered", actor(), f"{key}, {decisions(accepted)}", change)
    if act is None:
        return None
    say(f"{key.task} version {key.version}: {decisions(accepted)}")
    now = act.line_state.model(key)
    return Adopted(*key, now.state, now.reason)


def _external(space: Workspace, ledger: Ledger, key: ModelKey) -> ExternalModel | None:
    """The version in MLflow from which a model was adopted, if it is still there."""
    mlflow = ledger.state().model(key).mlflow
    if mlflow is None:
        return None
    shown = external_model(space.mlflow, ledger.line, key.task, mlflow.number)
    return shown if shown is not None and shown.mlflow == mlflow else None


def _own_facts(described: TaskSpec, external: ExternalModel | None) -> ModelFacts:
    """What the author measured and what the version's tag decides."""
    return ModelFacts(expected=described.expected, accepted=_accepted(external))


def _accepted(external: ExternalModel | None) -> dict[str, Acceptance]:
    """The decision in a version's tag; MLflow does not record who set it."""
    reason = "" if external is None else (external.accept_tag or "").strip()
    if not reason:
        return {}
    at = datetime.now(UTC).isoformat(timespec="microseconds")
    by = f"the tag {ACCEPT_TAG} in MLflow"
    return {NO_GAIN: Acceptance(reason=reason, by=by, at=at)}


def _with_description(line_state: LineState, spec: TaskSpec) -> LineState:
    known = declared_spec(line_state, spec.task)
    same = known is not None and same_task(known, spec)
    return line_state if same else line_state.with_task(spec.without_expected())


def _describe(space: Workspace, line_state: LineState, task: str, tag: str | None) -> _Description:
    """The description of a model's task: from its tag, or the one that the line has."""
    if tag is None:
        if declared_spec(line_state, task) is not None:
            return _Description()
        return _Description(
            problem=f"the task {task} has no description: run `restitch task {line_state.line} "
            "--task FILE`, or give the version the tag restitch.task"
        )
    try:
        spec, remember = resolved(space, line_state, _parsed(task, tag.strip()), replace_task=True)
        remember()
        return _Description(spec)
    except BadInput as error:
        return _Description(problem=f"its tag restitch.task cannot be used: {error.message()}")


def _parsed(task: str, tag: str) -> TaskSpec:
    """The task that a tag describes: the file at a path, or the tag itself."""
    origin, text, folder = "the tag restitch.task", tag, Path("/")
    if "\n" not in tag and (tag.startswith("/") or _SCHEME.match(tag)):
        try:
            parts = urlsplit(tag)
        except ValueError as error:
            raise BadInput(
                f"{origin} is not a valid address", found=error, hint="correct the tag in MLflow"
            ) from error
        if parts.scheme not in ("", "file"):
            raise BadInput(
                f"{origin} names an address that cannot be read",
                expected="an absolute path, file:///PATH, or the YAML itself",
                found=f"an address with {parts.scheme}:/",
                hint="correct the tag in MLflow",
            )
        path = named_path(unquote(parts.path) if parts.scheme else tag, None, origin)
        check_path(path, origin)
        origin, text, folder = str(path), read_text(path, "task file"), path.parent
    values = parse_mapping(text, origin)
    if values.setdefault("task", task) != task:
        raise BadInput(
            f"{origin} describes another task",
            expected=f"task: {task}",
            found=f"task: {values['task']}",
            hint="register the model as LINE.TASK with this task's name, or correct the tag",
        )
    return parse_task(json.dumps(values), origin, folder)


def _because(reason: str | None) -> str:
    return f": {reason}" if reason else ""
