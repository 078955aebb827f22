"""The heads of a line's tasks: their labels, their checks, and building missing ones again.

In a family whose tasks have heads of their own, a task file may leave out the labels: they are
those of the finetuned model then. A benchmark is scored by the base's own head.
"""

from restitch.merging.digests import digest_json
from restitch.merging.errors import BadInput
from restitch.modeling.families.family import Family
from restitch.modeling.heads import listed
from restitch.registry.ledger.finetuned_models import ModelRef
from restitch.registry.ledger.line_state import LineState
from restitch.registry.sources.resolve import resolve_source
from restitch.registry.specs.strict_yaml import checked
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.inputs.adapters import is_adapter
from restitch.tasks.inputs.checkpoints import Base, open_base, open_model
from restitch.tasks.inputs.live_base import live_base
from restitch.tasks.inputs.task_head import head_inputs, stored_head, task_head
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.workspace import Workspace


def with_labels(
    spec: TaskSpec, known: TaskSpec | None, family: Family, model: str | None, space: Workspace
) -> TaskSpec:
    """Fill in the labels that a task file leaves out, from the model whose head scores the task.

    Args:
        spec: the task as its file describes it.
        known: the task as the line knows it.
        family: the family of the line.
        model: the source of the model with the head; None if there is none yet.
        space: the workspace to fetch its configuration into.

    Raises:
        BadInput: the model has no head that chooses a class.
    """
    if family.task_heads is None or spec.has_head:
        return spec
    if known is not None and known.head is not None:
        return spec.model_copy(update={"head": known.head})
    if model is None:
        return spec
    source = resolve_source(model, space.home, whole=False)
    if is_adapter(source.local) and not (source.local / "config.json").is_file():
        raise BadInput(
            f"{source.uri} is an adapter, which does not name the classes of its head",
            expected="head: labels in the task file, in the order of the head's outputs",
            hint="add them, or put the config.json of the finetuned model next to the adapter",
        )
    try:
        labels = family.task_heads.labels(source.local)
        values = {**spec.to_json(), "head": {"labels": list(labels)}}
        return checked(TaskSpec, values, f"{source.uri}: id2label")
    except BadInput as error:
        raise error.renamed(str(source.local), source.uri) from error


def check_task_head(
    spec: TaskSpec, base: Base, model: ModelRef, space: Workspace
) -> tuple[str, ...]:
    """Refuse a finetuned model without the head of its task; returns notes.

    Raises:
        BadInput: the head is missing, of another kind, or has other classes than the task.
    """
    heads = base.family.task_heads
    if heads is None or not spec.uses_head:
        return ()
    folder, checkpoint = open_model(model, space, base.family, base=base)
    if not folder.is_dir():
        raise BadInput(
            f"{model.uri} is a file alone, and its head needs a configuration",
            expected="a folder with config.json, as save_pretrained writes it",
            hint="register the whole folder",
        )
    try:
        return heads.check(folder, checkpoint, listed(spec.head_spec).classes)
    except BadInput as error:
        raise error.renamed(str(folder), model.uri) from error


def check_own_head(name: str, spec: TaskSpec | None, base: Base) -> None:
    """Refuse a benchmark that the base's own head does not score.

    Args:
        name: of the benchmark.
        spec: its description; None if there is none yet.
        base: the base of the line.

    Raises:
        BadInput: the base has no head, or one with other classes.
    """
    heads = base.family.task_heads
    if heads is None:
        return
    try:
        if spec is not None and spec.uses_head:
            labels = listed(spec.head_spec).classes
        else:
            labels = heads.labels(base.folder)
        heads.check(base.folder, base.checkpoint, labels)
    except BadInput as error:
        renamed = error.renamed(str(base.folder), base.ref.uri)
        raise BadInput(
            f"the base has no head for the benchmark {name}: {renamed.summary}",
            expected=renamed.expected,
            found=renamed.found,
            details=renamed.details,
            hint="a benchmark of this family is scored by the base's own classifier; choose a task"
            " that it scores, or remove `retention` from the line file",
        ) from error


def head_file(spec: TaskSpec, base: Base, model: ModelRef, space: Workspace) -> bytes | None:
    """The file of a task's head; None if it has none, or if it was never measured.

    A head that lies in the finetuned model is read from there if the store lacks it.
    """
    if not spec.uses_head:
        return None
    record = stored_head(spec, base, model, space)
    if record is None and base.family.task_heads is not None:
        live = live_base(base, f"build the head of {spec.task}")
        return task_head(spec, base, live, model, space).to_bytes()
    return None if record is None else space.objects.read_blob(record.blob)


def heads_again(line_state: LineState, missing: set[str], space: Workspace) -> int:
    """Rebuild the heads with these digests of inputs.

    Args:
        line_state: the line's state.
        missing: the digests of their inputs, as in keys; rebuilt ones are removed from the set.
        space: the workspace to store them in.

    Returns:
        The number of heads that were built.

    Raises:
        RestitchError: the base cannot be read now.
    """
    base = open_base(LineRef(line_state.spec, line_state.base), space)
    made = 0
    for task in line_state.tasks.values():
        if not task.spec.has_head:
            continue
        for model in task.versions.values():
            for each in base.in_each_type():
                inputs = digest_json(head_inputs(task.spec, each, model.model))
                if inputs in missing:
                    live = live_base(each, f"build the head of {task.spec.task}")
                    task_head(task.spec, each, live, model.model, space)
                    missing.discard(inputs)
                    made += 1
    return made
