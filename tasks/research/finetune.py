"""Finetune sequentially on members' train rows: the training baseline of a study.

All localizable weights are trained. The head stays fixed; it is the one that the task is evaluated
with, as it was when the line's models were finetuned. Training starts from the base or from the
patch of the previous finetuning. The result is stored as a patch under the digest of all that it
depends on, including the previous patch. Gradients have equal bytes only on the same device, with
the same torch and threads: the first patch published counts.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from restitch.merging.digests import digest_json
from restitch.merging.files.sparse import SparseInfo
from restitch.merging.localize.trained import NAME as TRAINED
from restitch.merging.ranking.score_tensors import fingerprint
from restitch.merging.rules.stitch import write_patch
from restitch.modeling.data.task_data import stratified
from restitch.modeling.device import device
from restitch.modeling.families.family import Family
from restitch.modeling.finetuning import VERSION, FinetuningSettings
from restitch.modeling.finetuning import finetune as learn
from restitch.modeling.weights import apply_edits, restore
from restitch.registry.ledger.finetuned_models import Member
from restitch.registry.specs.task import TaskSpec
from restitch.registry.store.objects import KeyRecord
from restitch.tasks.inputs.checkpoints import Base, open_base, open_sparse
from restitch.tasks.inputs.live_base import LiveBase, live_base, memory_explained
from restitch.tasks.inputs.task_data import verified_data
from restitch.tasks.inputs.task_head import reading_inputs
from restitch.tasks.localizers import OpenCalibration, lacks, split_digests
from restitch.tasks.runtime.console import working
from restitch.tasks.runtime.engine import Cached, step
from restitch.tasks.runtime.free_memory import Part
from restitch.tasks.runtime.refs import LineRef, PatchRef
from restitch.tasks.runtime.workspace import Workspace, made_by, workspace

# Of each task, stratified by class; more rows take longer and improve little.
MOST_ROWS = 2000


def lacks_labels(task: TaskSpec, family: Family) -> str | None:
    """The data that finetuning needs and a task lacks; None if it has labelled train rows."""
    return lacks(TRAINED, task, family)


@step("finetune", "finetune on {member.task}")
def finetune(
    line: LineRef, member: Member, before: str | None = None
) -> PatchRef | Cached[PatchRef]:
    """Finetune the base, or the patch `before`, on a member's labelled train rows.

    Returns:
        The patch of the finetuned weights, with the seconds that training took.

    Raises:
        BadInput: the rows cannot be read, or the loss is not finite.
        Unavailable: the GPU runs out of memory.
    """
    space = workspace()
    # Steps are smaller than what bfloat16 can tell apart.
    base = replace(open_base(line, space), compute="float32")
    settings = FinetuningSettings.of(base.family.modality, seed=line.spec.localize.seed)
    key = digest_json(_inputs(base, member, before, settings))
    record = space.objects.lookup("finetuning", key)
    if record is not None:
        return Cached(_ref(record, key))
    began = time.perf_counter()
    with space.scratch() as scratch:
        file = scratch / "patch.safetensors"
        info = _learned(file, base, member, before, settings, space)
        blob = space.objects.put_blob(file, move=True, digest=info.digest)
    facts = {"kept": info.kept, "seconds": round(time.perf_counter() - began, 3)}
    maker = made_by() | {"device": device().type}
    won = space.objects.publish("finetuning", key, blob, maker, fingerprint(device()), facts)
    return _ref(won, key)


def _inputs(
    base: Base, member: Member, before: str | None, settings: FinetuningSettings
) -> dict[str, Any]:
    """All that the weights depend on."""
    return {
        "version": VERSION,
        "base": [base.ref.weights, base.ref.config],
        "family": [base.family.name, base.family.version],
        "localizable": list(base.names),
        "before": before,
        "settings": settings.to_json(),
        "rows": MOST_ROWS,
        "train": split_digests(member.spec)["train"],
        **reading_inputs(member.spec, base, member.model.model),
    }


def _learned(
    file: Path,
    base: Base,
    member: Member,
    before: str | None,
    settings: FinetuningSettings,
    space: Workspace,
) -> SparseInfo:
    """Finetune the live base and write its patch; afterwards restore the live base."""
    coordinates = sum(base.checkpoint.info(name).numel for name in base.names)
    step = Part("gradients and their two moments", 3 * 4 * coordinates)
    live = live_base(base, f"finetune on {member.task}", [step])
    every = verified_data(member.spec, base.family).rows("train")
    rows = every.select(stratified(every.strata, MOST_ROWS, 0))
    on = OpenCalibration.of(live, rows, member.spec, member.model.model, space)
    names = [name for name in base.names if name in live.parameters]
    lengths = rows.lengths() if rows.modality == "text" else np.zeros(len(rows), dtype=np.int64)
    room = "room for the weights, their gradients and the two moments of each"
    try:
        if before is not None:
            start = open_sparse(before, space, base.checkpoint)
            apply_edits(live.parameters, base.checkpoint, start)
        with (
            memory_explained(f"finetune on {member.task}", room),
            working(f"finetuning on {member.task}") as progress,
        ):
            learn(live.parameters, names, lengths, on.batch, on.loss, settings, progress=progress)
        edits = _Live(live, tuple(names))
        return write_patch(file, base.checkpoint, edits, {"base": base.ref.weights})
    finally:
        restore(live.parameters, base.checkpoint, names)


@dataclass(frozen=True)
class _Live:
    """Edits that copy the live weights; see `files.edits`."""

    live: LiveBase
    names: tuple[str, ...]

    def apply(self, name: str, flat: Tensor) -> None:
        """Overwrite a flat copy of the base's tensor with the live weights."""
        flat.copy_(self.live.parameters[name].detach().reshape(-1))


def _ref(record: KeyRecord, key: str) -> PatchRef:
    facts: Any = record.facts
    return PatchRef(record.blob, facts["kept"], record.size, key, facts["seconds"])
