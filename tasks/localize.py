"""Find the mask of one finetuned model and keep it as a sparse delta: once per model.

The key of a mask holds everything that determines it (DESIGN.md section 4); the first mask
published under a key stays, which is what makes a numeric localizer's result one result.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merging.checkpoint import Checkpoint
from merging.digests import digest_json
from merging.mask import Mask
from merging.overwrite import take
from merging.sparse import SparseTensor, write_sparse
from merging.task_vector import TaskVector
from registry.head import ModelRef
from registry.objects import KeyRecord
from registry.sources import resolve_source
from registry.specs import TaskSpec
from tasks.engine import Cached, step
from tasks.localizers import Localizer, localizer
from tasks.models import aligned, device, open_base, open_model, unchanged
from tasks.refs import DeltaRef, LineRef
from tasks.reporting import working
from tasks.workspace import Workspace, made_by, workspace


@step("localize", "localize {task.task}")
def localize(line: LineRef, task: TaskSpec, model: ModelRef) -> DeltaRef | Cached[DeltaRef]:
    """The sparse delta of a finetuned model: from the store, or localized now."""
    space = workspace()
    found_by, key = _inputs(line, task, model, space)
    record = space.objects.lookup("mask", key)
    if record is not None:
        return Cached(_ref(record))
    began = time.perf_counter()
    with space.scratch() as scratch:
        file = scratch / "delta.safetensors"
        found = write_delta(file, line, task, model, space)
        facts: dict[str, Any] = {
            "mask": found.mask,
            "kept": found.kept,
            "coordinates": found.coordinates,
            "localizer": found_by.label,
            "seconds": round(time.perf_counter() - began, 3),
        }
        blob = space.objects.put_blob(file, move=True)
    maker = made_by() | {"device": device().type}
    return _ref(space.objects.publish("mask", key, blob, maker, found_by.fingerprint, facts))


def mask_key(line: LineRef, task: TaskSpec, model: ModelRef, space: Workspace) -> str:
    """The digest of all that determines a model's mask."""
    return _inputs(line, task, model, space)[1]


def _inputs(
    line: LineRef, task: TaskSpec, model: ModelRef, space: Workspace
) -> tuple[Localizer, str]:
    base = open_base(line, space)
    found_by = localizer(line, task, base, model, space)
    # What was resolved from names and globs is in the key, not the globs.
    inputs = {
        "base": [base.ref.weights, base.ref.config],
        "finetuned": model.weights,
        "family": [base.family.name, base.family.version],
        "localizable": list(base.names),
        "localizer": found_by.inputs(),
    }
    return found_by, digest_json(inputs)


@dataclass(frozen=True)
class FoundDelta:
    """What a delta that was written holds."""

    mask: str
    kept: int
    coordinates: int


def write_delta(
    file: Path, line: LineRef, task: TaskSpec, model: ModelRef, space: Workspace
) -> FoundDelta:
    """Find a finetuned model's mask and write its delta to a file beside which there is room."""
    base = open_base(line, space)
    found_by = localizer(line, task, base, model, space)
    folder = resolve_source(model.uri, space.home, whole=False).local
    # What is verified at the beginning is what is read to the end.
    with unchanged(folder), unchanged(base.folder):
        base = open_base(line, space)
        _, checkpoint = open_model(model, space, base.family, like=base.checkpoint)
        finetuned = aligned(base, checkpoint)
        vector = TaskVector(base.checkpoint, finetuned, base.names)
        with working(f"localizing {task.task}") as progress:
            mask = found_by.find(vector, file.parent, progress)
        info = write_sparse(
            file,
            _kept(finetuned, mask),
            kind="delta",
            metadata={"base": base.ref.weights, "finetuned": model.weights},
        )
    return FoundDelta(mask.digest(), info.kept, vector.coordinates)


def _kept(finetuned: Checkpoint, mask: Mask) -> Iterator[SparseTensor]:
    """The finetuned values at the mask's coordinates, tensor by tensor."""
    for name in mask.names:
        coordinates = mask.coordinates(name)
        values = take(finetuned.tensor(name).reshape(-1), coordinates.numpy())
        yield SparseTensor(name, finetuned.info(name).shape, coordinates, values)


def _ref(record: KeyRecord) -> DeltaRef:
    facts: dict[str, Any] = record.facts
    return DeltaRef(
        blob=record.blob,
        mask=facts["mask"],
        kept=facts["kept"],
        coordinates=facts["coordinates"],
        size=record.size,
        localizer=facts["localizer"],
        seconds=facts.get("seconds"),
        made_by=record.made_by,
    )
