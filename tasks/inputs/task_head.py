"""The head of a task: its description for a base, its key, and building it."""

from functools import lru_cache
from pathlib import Path

from restitch.merging.digests import digest_json
from restitch.merging.errors import BadInput
from restitch.modeling.families.family import get_family
from restitch.modeling.heads import Head, listed
from restitch.registry.ledger.finetuned_models import ModelRef
from restitch.registry.sources.resolve import resolve_source
from restitch.registry.specs.head import HeadSpec
from restitch.registry.specs.task import TaskSpec
from restitch.registry.store.objects import KeyRecord
from restitch.serving.served_version import head_inputs as inputs_of_head
from restitch.tasks.inputs.adapters import is_adapter
from restitch.tasks.inputs.checkpoints import Base, open_model
from restitch.tasks.inputs.live_base import LiveBase
from restitch.tasks.runtime.console import working
from restitch.tasks.runtime.workspace import Workspace


def resolved_head(spec: TaskSpec, base: Base) -> HeadSpec:
    """The task's head with the family's defaults for this base."""
    return _resolved(listed(spec.head_spec), base.family.name, base.folder, base.ref.config)


@lru_cache(maxsize=256)
def _resolved(head: HeadSpec, family: str, folder: Path, _config: str) -> HeadSpec:
    # Cached: it opens a tokenizer, and every lookup of a result needs it.
    return get_family(family).resolve(folder, head)


def head_inputs(spec: TaskSpec, base: Base, finetuned: ModelRef | None) -> dict[str, object]:
    """Everything that the head is built from; its digest is the head's key.

    All that runs the model uses the head. So this digest also brings the type of the weights into
    the keys of results, masks and statistics.
    """
    resolved = resolved_head(spec, base)
    return inputs_of_head(base.family, base.ref, resolved, finetuned, base.compute_type)


def stored_head(
    spec: TaskSpec, base: Base, finetuned: ModelRef | None, space: Workspace
) -> KeyRecord | None:
    """The record of the task's head, whichever worker built it; None if there is none."""
    keys = (digest_json(head_inputs(spec, each, finetuned)) for each in base.in_each_type())
    records = (space.objects.lookup("head", key) for key in keys)
    return next((record for record in records if record is not None), None)


def reading_inputs(spec: TaskSpec, base: Base, finetuned: ModelRef | None) -> dict[str, object]:
    """How rows are read: their columns, the head, and if rows are set apart; for keys."""
    data = spec.data
    assert data is not None
    assert data.content is not None
    return {
        "columns": [
            data.content[key] for key in ("input", "label", "read_as") if key in data.content
        ],
        # Without validation rows, a part of train is set apart.
        "set_apart": data.validation is None,
        "head": digest_json(head_inputs(spec, base, finetuned)),
    }


def task_head(
    spec: TaskSpec, base: Base, live: LiveBase, finetuned: ModelRef | None, space: Workspace
) -> Head:
    """The task's head: from the store, or built from the base and stored."""
    inputs = digest_json(head_inputs(spec, base, finetuned))
    record = space.objects.lookup("head", inputs)
    if record is None:
        folder = None
        if base.family.task_heads is not None and finetuned is not None:
            folder = _classifier_folder(finetuned, base, space)
        with working(f"embedding the labels of {spec.task}") as progress:
            head = base.family.build_head(
                live.model,
                base.folder,
                resolved_head(spec, base),
                finetuned=folder,
                progress=progress,
            )
        if not all(bool(tensor.isfinite().all()) for tensor in head.tensors.values()):
            raise BadInput(
                f"the head of task {spec.task} has numbers that are not finite",
                hint="check the labels and templates of the task",
            )
        blob = space.objects.put_blob(head.to_bytes())
        record = space.objects.publish("head", inputs, blob, made_by="head")
    return Head.from_bytes(space.objects.read_blob(record.blob)).to(live.device)


def _classifier_folder(finetuned: ModelRef, base: Base, space: Workspace) -> Path:
    """A folder with the configuration and the head of a finetuned model."""
    local = resolve_source(finetuned.uri, space.home).local
    if is_adapter(local):
        local, _ = open_model(finetuned, space, base.family, base=base)
    return local
