"""Stitching: one model out of the base and the members' sparse deltas.

Deltas hold finetuned values, so stitching needs no arithmetic where a coordinate has one
owner: the merged weight is the finetuned one, cast once to the base's type (bit for bit
the same where the types are equal). On a shared coordinate it is the mean over the
owners: summed in float64 in the order of the members, rounded once. Members are ordered
by the UTF-8 bytes of their task, so the order of registration cannot matter. Nothing is
computed before a tensor is asked for.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merging.checkpoint import Checkpoint, by_bytes
from merging.edits import Edits, NoEdits
from merging.errors import BadInput
from merging.progress import Progress, ignore
from merging.rounding import round_once
from merging.sparse import SparseFile, SparseInfo, SparseTensor, write_sparse

VERSION = 1
OVERLAPS = ("mean",)

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Member:
    """One model in a merged version: its task and its sparse delta."""

    task: str
    delta: SparseFile


def stitch(base: Checkpoint, members: Iterable[Member], overlap: str = "mean") -> Edits:
    """The edits that make the merged model out of the base.

    Args:
        base: the base's checkpoint.
        members: the members in any order, each task once.
        overlap: what becomes of shared coordinates; `mean` is the paper's.
    """
    ordered = sorted(members, key=lambda member: by_bytes(member.task))
    if overlap not in OVERLAPS:
        raise BadInput(
            "the rule for shared coordinates is unknown",
            expected=" or ".join(OVERLAPS),
            found=overlap,
            hint="correct method: overlap",
        )
    if len({member.task for member in ordered}) != len(ordered):
        raise ValueError("a task is there twice")
    for member in ordered:
        _check(base, member)
    return _Stitched(ordered) if ordered else NoEdits()


def write_patch(
    path: Path,
    base: Checkpoint,
    edits: Edits,
    metadata: Mapping[str, str],
    progress: Progress | None = None,
) -> SparseInfo:
    """Write the coordinates whose bytes differ from the base's, with their new values.

    The patch is a function of the base and the merged model alone, however the edits
    came about.
    """
    return write_sparse(
        path, _differences(base, edits, progress or ignore), kind="patch", metadata=metadata
    )


def _check(base: Checkpoint, member: Member) -> None:
    wrong = []
    for name in member.delta.names:
        found = list(member.delta.info(name).shape)
        if name not in base:
            wrong.append(f"{name}: not in the base")
        elif list(base.info(name).shape) != found:
            wrong.append(f"{name}: base {list(base.info(name).shape)}, delta {found}")
    if wrong or member.delta.kind != "delta":
        raise BadInput(
            f"the delta of {member.task!r} does not fit the base {base.path}",
            expected="a delta with tensors of the base",
            found=f"a {member.delta.kind} ({member.delta.path})",
            hint="localize the member again on this base",
            details=wrong,
        )


class _Stitched:
    """Edits by members in order; see `stitch`."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = tuple(members)
        names = {name for member in members for name in member.delta.names}
        self.names = tuple(sorted(names, key=by_bytes))

    def apply(self, name: str, flat: Tensor) -> None:
        """Overwrite the owned coordinates of a flat copy of the base's tensor."""
        deltas = [member.delta for member in self._members if name in member.delta]
        if len(deltas) == 1:
            _put(flat, deltas[0].coordinates(name).numpy(), deltas[0].values(name))
            return
        owners: NDArray[Any] = np.zeros(
            flat.numel(), dtype=np.uint8 if len(deltas) < 256 else np.uint16
        )
        for delta in deltas:
            coordinates = delta.coordinates(name).numpy()
            owners[coordinates] += 1
            _put(flat, coordinates, delta.values(name))
        shared = np.flatnonzero(owners > 1)
        if len(shared):
            total = np.zeros(len(shared), dtype=np.float64)
            for delta in deltas:
                coordinates = delta.coordinates(name).numpy()
                mine = np.flatnonzero(owners[coordinates] > 1)
                values = delta.values(name)[torch.from_numpy(mine)].to(torch.float64).numpy()
                total[np.searchsorted(shared, coordinates[mine])] += values
            total /= owners[shared]
            _put(flat, shared, torch.from_numpy(total))


def _put(flat: Tensor, coordinates: NDArray[np.int64], values: Tensor) -> None:
    """flat[coordinates] = values, rounded once."""
    _integers(flat)[coordinates] = _integers(round_once(values, flat.dtype))


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _integers(flat: Tensor) -> NDArray[Any]:
    # Numpy knows no bfloat16, and bytes are compared and moved exactly as integers.
    return flat.view(_INTEGERS[flat.dtype.itemsize]).numpy()


def _differences(base: Checkpoint, edits: Edits, progress: Progress) -> Iterator[SparseTensor]:
    total, done = sum(base.info(name).nbytes for name in edits.names), 0
    for name in edits.names:
        before = base.tensor(name).view(-1)
        after = before.clone()
        edits.apply(name, after)
        old, new = _integers(before), _integers(after)
        found = [
            np.flatnonzero(old[start : start + _BLOCK] != new[start : start + _BLOCK]) + start
            for start in range(0, len(old), _BLOCK)
        ]
        coordinates = torch.from_numpy(np.concatenate(found)) if found else torch.empty(0).long()
        yield SparseTensor(name, base.info(name).shape, coordinates, after[coordinates])
        done += base.info(name).nbytes
        progress(done, total)
