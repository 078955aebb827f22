"""Specialists as files: one shared patch and a mask file for each, or a patch for each.

`write_experts` computes everything once, tensor by tensor. The shared patch holds the weights of
base + multi-task vector that differ from the base's, and a mask one bit for each of them. A
`StoredExpert` is the base with the weights that its mask selects, copied bit for bit. With a scale,
their difference from the base is multiplied by it and rounded once, as in the method's own edits.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from restitch.merging.digests import digest_file
from restitch.merging.experts.specialists import Experts, Selected, SharedExperts
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.edits import Edits
from restitch.merging.files.mask_file import Bits, MaskFile, MaskWriter
from restitch.merging.files.sparse import SparseFile, SparseTensor, damage, write_sparse
from restitch.merging.numerics.bitwise import gather, scatter
from restitch.merging.numerics.rounding import cast
from restitch.merging.progress import Progress, ignore
from restitch.merging.ranking.member_vector import working_dtype
from restitch.merging.rules.stitch import differences, write_patch

_SHARED, _SCALE = "shared", "scale"


@dataclass(frozen=True)
class ExpertFiles:
    """The files of a set of specialists.

    Attributes:
        shared: the shared patch; None if each task has its own.
        tasks: the mask file, or the own patch, of each task.
    """

    shared: Path | None
    tasks: Mapping[str, Path]


def write_experts(
    folder: Path,
    base: Checkpoint,
    experts: Experts,
    metadata: Mapping[str, str],
    progress: Progress | None = None,
) -> ExpertFiles:
    """Write all specialists of a set of experts.

    Args:
        folder: an existing folder.
        base: the base's checkpoint.
        experts: the result of a merge method.
        metadata: text for the metadata of each file.
        progress: called with the bytes done and the total.
    """
    paths = {task: folder / f"{number}.task" for number, task in enumerate(experts.tasks)}
    if not isinstance(experts, SharedExperts):
        for task, path in paths.items():
            write_patch(path, base, experts.for_task(task), {**metadata, "task": task}, progress)
        return ExpertFiles(None, paths)
    shared = folder / "shared"
    with ExitStack() as stack:
        writers = {task: stack.enter_context(MaskWriter(folder)) for task in paths}
        tensors = _shared_tensors(base, experts, writers, progress or ignore)
        write_sparse(shared, tensors, kind="patch", metadata=metadata)
        binding = {**metadata, _SHARED: digest_file(shared)}
        for task, writer in writers.items():
            own = {"task": task, _SCALE: experts.scale(task).hex()}
            writer.finish(paths[task], {**binding, **own})
    return ExpertFiles(shared, paths)


def _shared_tensors(
    base: Checkpoint, experts: SharedExperts, writers: Mapping[str, MaskWriter], progress: Progress
) -> Iterator[SparseTensor]:
    """The tensors of the shared patch; the masks of a tensor are written before it is yielded."""
    seen: list[tuple[int, Mapping[int, NDArray[np.uint8]]]] = []

    def observe(part: Selected) -> None:
        packed = {number: np.packbits(mask) for number, mask in part.masks.items()}
        seen.append((len(part.together), packed))

    for tensor in differences(base, experts.observed(observe), progress):
        places = tensor.coordinates.numpy()
        for number, task in enumerate(experts.tasks):
            writers[task].add(tensor.name, _unpacked(seen, number)[places])
        seen.clear()
        yield tensor


def _unpacked(seen: list[tuple[int, Mapping[int, NDArray[np.uint8]]]], number: int) -> Bits:
    parts = [
        np.unpackbits(packed[number], count=count)
        if number in packed
        else np.zeros(count, np.uint8)
        for count, packed in seen
    ]
    return np.concatenate([np.empty(0, np.uint8), *parts]).view(np.bool_)


class StoredExpert:
    """One specialist that shares a patch with others; it is a `StreamedEdits`.

    Args:
        shared: the patch.
        mask: the weights of the patch that the specialist takes.
        scale: the factor of their differences from the base.
    """

    def __init__(self, shared: SparseFile, mask: MaskFile, scale: float) -> None:
        self.shared = shared
        self.mask = mask
        self.scale = scale
        self.names = mask.names

    def apply(self, name: str, flat: Tensor) -> None:
        """Overwrite the selected weights in a flat copy of the base's tensor."""
        self.editor(name)(flat)

    def editor(self, name: str) -> Callable[[Tensor], None]:
        """A function that edits the parts of a tensor in order."""
        cursor, bits = self.shared.cursor(name), self.mask.bits(name)
        done = 0

        def edit(part: Tensor) -> None:
            nonlocal done
            for coordinates, values in cursor.advance(part.numel()):
                chosen = np.flatnonzero(bits[done : done + len(coordinates)])
                done += len(coordinates)
                places = coordinates[chosen]
                after = self._scaled(gather(part, places), gather(values, chosen))
                scatter(part, places, after)

        return edit

    def _scaled(self, before: Tensor, after: Tensor) -> Tensor:
        if self.scale == 1:
            return after
        wide = working_dtype(before.dtype)
        start = cast(before, wide).numpy()
        change = cast(after, wide).numpy() - start
        return torch.from_numpy(start + self.scale * change)


def open_expert(path: Path, patch: Callable[[str], Path], base: Checkpoint | None = None) -> Edits:
    """Open edits from a mask file and the patch that it names, from a patch or from a delta.

    Args:
        path: the file.
        patch: returns the path of a patch by its digest.
        base: the base, required to read values in 8 bits.

    Raises:
        BadInput: the file is none of these.
        Damage: a mask file does not match the patch that it names.
    """
    metadata = Checkpoint.open(path).metadata
    if metadata.get("restitch.kind") != "mask":
        return SparseFile.open(path, base)
    try:
        shared, scale = metadata[_SHARED], _scale(metadata[_SCALE])
    except (KeyError, ValueError, OverflowError) as err:
        found = f"{_SHARED} {metadata.get(_SHARED)!r}, {_SCALE} {metadata.get(_SCALE)!r}"
        raise damage(path, "the digest of its shared patch, and a scale", found) from err
    opened = SparseFile.open(patch(shared), base)
    return StoredExpert(opened, MaskFile.open(path, opened), scale)


def _scale(text: str) -> float:
    value = float.fromhex(text)
    if not 0 <= value < math.inf:
        raise ValueError(f"{text!r} is not a scale")
    return value
