"""Localize a finetuned model once, and store its delta: a mask with the values, or a subspace.

The key of a mask covers all that determines it. The first mask published under a key stays, so a
numeric localizer has one result per key.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from restitch.merging.digests import digest_json
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.factor_file import FactorFile, write_factors
from restitch.merging.files.mask import Mask, WholeMask
from restitch.merging.files.quantized import quantized
from restitch.merging.files.sparse import SparseInfo, SparseTensor, write_sparse, write_whole
from restitch.merging.localize.subspace import NAME as SUBSPACE
from restitch.merging.localize.subspace import own_factors
from restitch.merging.numerics.bitwise import gather
from restitch.merging.progress import Progress
from restitch.merging.ranking.task_vector import TaskVector
from restitch.modeling.device import device
from restitch.modeling.gradients import checkpointed
from restitch.registry.ledger.finetuned_models import ModelRef
from restitch.registry.specs.localize import LocalizeSpec
from restitch.registry.specs.task import TaskSpec
from restitch.registry.store.objects import KeyRecord
from restitch.tasks.density import Density
from restitch.tasks.inputs.checkpoints import Base, open_base, open_vector
from restitch.tasks.inputs.live_base import live_base, memory_explained
from restitch.tasks.localizers import Localizer, Ranking, localizer
from restitch.tasks.runtime.console import warn, working
from restitch.tasks.runtime.engine import Cached, step
from restitch.tasks.runtime.refs import DeltaRef, LineRef, WrittenDelta
from restitch.tasks.runtime.workspace import Workspace, made_by, workspace
from restitch.tasks.subspace import Subspace

# The encoding of 8-bit values; raised when the same input gives other bytes.
QUANTIZED = "int8/1"

# Facts of a mask's key record on how it was localized; each is optional.
RECORDED_FACTS = ("calibrated_with", "calibration_rows", "budget", "recovery")


@step("localize", "localize {task.task}")
def localize(line: LineRef, task: TaskSpec, model: ModelRef) -> DeltaRef | Cached[DeltaRef]:
    """The sparse delta of a finetuned model, from the store or localized now."""
    space = workspace()
    plan = _plan(open_base(line, space), line, task, model, space)
    record = space.objects.lookup("mask", plan.key)
    if record is not None:
        return Cached(_ref(record))
    began = time.perf_counter()
    with space.scratch() as scratch:
        file = scratch / "delta.safetensors"
        written = _write(file, line, model, space, plan)
        facts: dict[str, Any] = {
            "mask": written.mask,
            "kept": written.kept,
            "coordinates": written.coordinates,
            "localizer": plan.kept.label,
            "seconds": round(time.perf_counter() - began, 3),
            **written.facts,
        }
        blob = space.objects.put_blob(file, move=True, digest=written.digest)
    maker = made_by() | {"device": device().type}
    return _ref(space.objects.publish("mask", plan.key, blob, maker, plan.kept.fingerprint, facts))


def mask_keys(line: LineRef, task: TaskSpec, model: ModelRef, space: Workspace) -> tuple[str, ...]:
    """The digest of all that determines a model's mask, for each type to compute in."""
    bases = open_base(line, space).in_each_type()
    return tuple(_plan(base, line, task, model, space).key for base in bases)


def _plan(
    base: Base,
    line: LineRef,
    task: TaskSpec,
    model: ModelRef,
    space: Workspace,
    recorded: int | None = None,
) -> "_Plan":
    choice = line.spec.localize
    kept: _Masks | Subspace
    if choice.mode == SUBSPACE:
        kept = Subspace(choice, task, base, model, space, recorded)
    else:
        chosen = localizer(line, task, base, model, space)
        kept = _Masks(choice, chosen, Density(choice, task, base, model, space, recorded))
    # The key has the tensors that globs resolved to, not the globs.
    inputs = {
        "base": [base.ref.weights, base.ref.config],
        "finetuned": model.weights,
        "family": [base.family.name, base.family.version],
        "localizable": list(base.names),
        **kept.inputs(),
    }
    return _Plan(kept, digest_json(inputs))


@dataclass(frozen=True)
class _Masks:
    """Keeps a mask of a model: the localizer ranks its coordinates, and the density cuts."""

    choice: LocalizeSpec
    localizer: Localizer
    density: Density

    @property
    def label(self) -> str:
        return self.localizer.label

    @property
    def fingerprint(self) -> JsonValue:
        return self.localizer.fingerprint

    @property
    def _keeps_everything(self) -> bool:
        choice = self.choice
        everything = (choice.mode, choice.density, choice.values) == ("dataless", 1.0, "exact")
        return everything and choice.budget is None

    def inputs(self) -> dict[str, Any]:
        density = self.density.inputs()
        return {
            "localizer": self.localizer.inputs(),
            **({} if density is None else {"density": density}),
            **({} if self.choice.values == "exact" else {"values": QUANTIZED}),
        }

    def write(
        self, file: Path, vector: TaskVector, base: Base, metadata: Mapping[str, str]
    ) -> WrittenDelta:
        finetuned = vector.finetuned
        if self._keeps_everything and any(finetuned.factors(name) for name in vector.names):
            written = write_factors(file, own_factors(vector), metadata=metadata)
            subspace, facts = FactorFile.open(file).content_digest(), Ranking(None).facts()
            return WrittenDelta(written.digest, subspace, written.kept, vector.coordinates, facts)
        before = vector.base if self.choice.values == "int8" else None
        with working(f"localizing {self.density.task.task}") as progress:
            ranking = _ranked(self.localizer, vector, base, file.parent, progress)

        def write(mask: Mask) -> SparseInfo:
            if isinstance(mask, WholeMask) and before is None and not ranking.factors:
                names = mask.names
                return write_whole(file, finetuned, names, kind="delta", metadata=metadata)
            values = kept_values(finetuned, mask, ranking.factors, in_8_bits_from=before)
            return write_sparse(file, values, kind="delta", metadata=metadata)

        mask = ranking.mask
        choice: dict[str, Any] = {}
        if mask is None:
            assert ranking.scores is not None, "a ranking has scores or a mask"
            mask, choice = self.density.choose(
                ranking.scores, finetuned, lambda some: write(some).bytes, file.parent
            )
        info = write(mask)
        facts = {**ranking.facts(), **choice}
        return WrittenDelta(info.digest, mask.digest(), info.kept, vector.coordinates, facts)


@dataclass(frozen=True)
class _Plan:
    """What is kept of a model, and the digest of all that determines it."""

    kept: _Masks | Subspace
    key: str


def write_delta(
    file: Path,
    line: LineRef,
    task: TaskSpec,
    model: ModelRef,
    space: Workspace,
    recorded: int | None = None,
) -> WrittenDelta:
    """Localize a finetuned model and write its delta; temporary files go to the same folder.

    Args:
        file: the file to write.
        line: the line.
        task: the model's task.
        model: the finetuned model.
        space: the workspace.
        recorded: how much validation rows chose to keep before. The rule may have changed since.
    """
    plan = _plan(open_base(line, space), line, task, model, space, recorded)
    return _write(file, line, model, space, plan)


def _write(
    file: Path, line: LineRef, model: ModelRef, space: Workspace, plan: _Plan
) -> WrittenDelta:
    with open_vector(line, model, space) as (base, vector):
        metadata = {"base": base.ref.weights, "finetuned": model.weights}
        return plan.kept.write(file, vector, base, metadata)


def _ranked(
    chosen: Localizer, vector: TaskVector, base: Base, scratch: Path, progress: Progress
) -> Ranking:
    """Rank; when the GPU runs out of memory, again with activation checkpointing."""
    try:
        return chosen.rank(vector, scratch, progress)
    except torch.OutOfMemoryError:
        warn(
            "localizing ran out of GPU memory and starts again with activation checkpointing, "
            "which is slower"
        )
    torch.cuda.empty_cache()
    room = "room for the base and the finetuned weights, and one score per coordinate"
    hint = ", or localize with mode: fisher, which stores no scores, or mode: dataless"
    model = live_base(base, "localize this model").model
    with memory_explained("localize this model", room, hint), checkpointed(model):
        return chosen.rank(vector, scratch, progress)


def kept_values(
    finetuned: Checkpoint,
    mask: Mask,
    factors: Mapping[str, Tensor],
    *,
    in_8_bits_from: Checkpoint | None = None,
) -> Iterator[SparseTensor]:
    """The finetuned values at the mask's coordinates, tensor by tensor.

    Args:
        finetuned: the finetuned model under the base's tensor names.
        mask: the coordinates.
        factors: the sensitivity of the coordinates by tensor, if the localizer measured it.
        in_8_bits_from: the base, to store values as 8-bit steps from its own.
    """
    for name in mask.names:
        coordinates = mask.coordinates(name)
        values = gather(finetuned.tensor(name).reshape(-1), coordinates.numpy())
        shape = finetuned.info(name).shape
        known = factors.get(name)
        if in_8_bits_from is None:
            yield SparseTensor(name, shape, coordinates, values, known)
        else:
            before = in_8_bits_from.tensor(name).view(-1)
            stored = quantized(coordinates, values, before, shape)
            yield SparseTensor(name, shape, coordinates, stored, known)


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
        facts={name: facts[name] for name in RECORDED_FACTS if name in facts},
    )
