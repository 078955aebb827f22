"""Stitching: one model out of the base and the members' sparse deltas.

Deltas hold finetuned values, so stitching needs no arithmetic where a coordinate has one
owner: the merged weight is the finetuned one, cast once to the base's type (bit for bit
the same where the types are equal). On a shared coordinate it is by default the mean over
the owners: summed in float64 in the order of the members, rounded once; the other rules
are in `restitch.merging.rules.overlaps`. Members are ordered by the UTF-8 bytes of their task, so the
order of registration cannot matter. Nothing is computed before a tensor is asked for.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.coordinate_codec import true_positions
from restitch.merging.files.edits import Edits, NoEdits
from restitch.merging.files.sparse import Piece, SparseFile, SparseInfo, SparseTensor, write_sparse
from restitch.merging.numerics.bitwise import as_integers, gather, scatter
from restitch.merging.numerics.rounding import cast
from restitch.merging.order import by_bytes
from restitch.merging.progress import Progress, ignore
from restitch.merging.rules.overlaps import MEAN, RULES, Floats, Owner, Rule

VERSION = 1
OVERLAPS = (MEAN, *RULES)

_BLOCK = 1 << 19
_NOWHERE = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class DeltaMember:
    """One model in a merged version.

    Attributes:
        task: its task.
        delta: its sparse delta.
        statistics: what a method that needs more knows of it, by `Method.needs`.
    """

    task: str
    delta: SparseFile
    statistics: Mapping[str, Checkpoint] = field(default_factory=dict)


def stitch(base: Checkpoint, members: Iterable[DeltaMember], overlap: str | Rule = MEAN) -> Edits:
    """The edits that make the merged model out of the base.

    Args:
        base: the base's checkpoint.
        members: the members in any order, each task once.
        overlap: what becomes of shared coordinates: one of `OVERLAPS`, of which `mean` is the
            paper's, or a rule of a method's own.
    """
    ordered = sorted(members, key=lambda member: by_bytes(member.task))
    if isinstance(overlap, str) and overlap not in OVERLAPS:
        raise BadInput(
            "the rule for shared coordinates is unknown",
            expected=" or ".join(OVERLAPS),
            found=overlap,
            hint="correct method: overlap",
        )
    if len({member.task for member in ordered}) != len(ordered):
        raise ValueError("a task is there twice")
    for member in ordered:
        check_fit(base, member)
    rule = RULES.get(overlap) if isinstance(overlap, str) else overlap
    return _Stitched(ordered, rule) if ordered else NoEdits()


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
        path, differences(base, edits, progress or ignore), kind="patch", metadata=metadata
    )


def check_fit(base: Checkpoint, member: DeltaMember) -> None:
    """Make sure that a member's delta is one for this base.

    Raises:
        BadInput: it has other tensors, or is no delta.
    """
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
    """Edits by members in order; without a rule by the mean. See `stitch`."""

    def __init__(self, members: Sequence[DeltaMember], rule: Rule | None) -> None:
        self._members = tuple(members)
        self._rule = rule
        names = {name for member in members for name in member.delta.names}
        self.names = tuple(sorted(names, key=by_bytes))
        self._own = threading.local()

    def apply(self, name: str, flat: Tensor) -> None:
        """Overwrite the owned coordinates of a flat copy of the base's tensor."""
        self.editor(name)(flat)

    def editor(self, name: str) -> Callable[[Tensor], None]:
        """A function that edits the parts of a tensor, given one after the other."""
        deltas = [member.delta for member in self._members if name in member.delta]
        if len(deltas) == 1:
            return deltas[0].editor(name)
        cursors = [delta.cursor(name) for delta in deltas]
        importances = [_Importance.of(delta, name) for delta in deltas]
        block: _Block | None = getattr(self._own, "block", None)
        if block is None:
            block = self._own.block = _Block(len(self._members))
        start = 0

        def edit(part: Tensor) -> None:
            nonlocal start
            for piece in torch.split(part, _BLOCK):
                taken = [cursor.advance(piece.numel()) for cursor in cursors]
                if self._rule is None:
                    block.average(piece, taken)
                else:
                    block.settle(
                        piece, taken, self._rule, [one.after(start) for one in importances]
                    )
                start += piece.numel()

        return edit


@dataclass(frozen=True)
class _Importance:
    """What the coordinates of a tensor are importances to a member, counted from `start`."""

    factors: tuple[Floats, Floats] | None
    start: int = 0

    @classmethod
    def of(cls, delta: SparseFile, name: str) -> "_Importance":
        found = delta.factors(name)
        return cls(None if found is None else (_wide(found[0]), _wide(found[1])))

    def after(self, start: int) -> "_Importance":
        return _Importance(self.factors, start)

    def __getitem__(self, coordinates: NDArray[np.int64]) -> Floats | None:
        if self.factors is None:
            return None
        rows, columns = self.factors
        row, column = np.divmod(coordinates + self.start, len(columns))
        found: Floats = rows[row] * columns[column]
        return found


def _wide(factors: Tensor) -> Floats:
    found: Floats = cast(factors, torch.float64).numpy()
    return found


class _Block:
    """Stitches ranges of at most `_BLOCK` weights, for which a core's cache is large enough."""

    def __init__(self, members: int) -> None:
        self._ones = torch.ones(_BLOCK, dtype=torch.uint8 if members < 256 else torch.int16)
        self._owners = torch.empty_like(self._ones)
        self._totals = torch.zeros(_BLOCK, dtype=torch.float64)

    def average(self, flat: Tensor, members: Sequence[Sequence[Piece]]) -> None:
        """The mean where there are several owners; no base is needed."""
        pieces = [piece for taken in members for piece in taken]
        owners, shared = self._shared(flat.numel(), pieces)
        for coordinates, values in pieces:
            scatter(flat, coordinates, values)
        if not len(shared):
            return
        totals = self._totals[: flat.numel()]
        totals.numpy()[shared] = 0
        for coordinates, values in pieces:
            # Everywhere, for that is faster than picking; only shared places are read.
            index = torch.from_numpy(coordinates)
            totals.scatter_add_(0, index, cast(values, torch.float64))
        means = totals.numpy()[shared] / owners[shared]
        scatter(flat, shared, torch.from_numpy(means))

    def settle(
        self,
        flat: Tensor,
        members: Sequence[Sequence[Piece]],
        rule: Rule,
        importances: Sequence["_Importance"],
    ) -> None:
        """What the rule says where there are several owners; `flat` holds the base's weights."""
        owners, shared = self._shared(flat.numel(), [p for taken in members for p in taken])
        before = cast(gather(flat, shared), torch.float64).numpy()
        column = np.empty(flat.numel() if len(shared) else 0, dtype=np.int64)
        column[shared] = np.arange(len(shared))
        claimants = []
        for taken, own in zip(members, importances, strict=True):
            for coordinates, values in taken:
                scatter(flat, coordinates, values)
                chosen = owners[coordinates] > 1
                asked = coordinates[chosen]
                places = column[asked]
                wanted = cast(gather(values, np.flatnonzero(chosen)), torch.float64).numpy()
                claimants.append(Owner(places, wanted - before[places], own[asked]))
        if len(shared):
            scatter(flat, shared, torch.from_numpy(rule(before, claimants)))

    def _shared(
        self, size: int, pieces: Sequence[Piece]
    ) -> tuple[NDArray[np.integer[Any]], NDArray[np.int64]]:
        """How many owners each weight has, and where there are several."""
        owners = self._owners[:size]
        owners.numpy().fill(0)  # in this thread; torch would start others for it
        for coordinates, _ in pieces:
            index = torch.from_numpy(coordinates)
            owners.scatter_add_(0, index, self._ones[: len(coordinates)])
        return owners.numpy(), true_positions(owners.numpy() > 1)


def differences(base: Checkpoint, edits: Edits, progress: Progress) -> Iterator[SparseTensor]:
    """Where the bytes of edited tensors differ from the base's, tensor by tensor."""
    total, done = sum(base.info(name).nbytes for name in edits.names), 0
    for name in edits.names:
        before = base.tensor(name).view(-1)
        old = as_integers(before)
        new = old.copy()
        after = torch.from_numpy(new).view(before.dtype)
        edits.apply(name, after)
        found = [
            true_positions(old[start : start + _BLOCK] != new[start : start + _BLOCK]) + start
            for start in range(0, len(old), _BLOCK)
        ]
        coordinates = np.concatenate([_NOWHERE, *found])
        yield SparseTensor(
            name, base.info(name).shape, torch.from_numpy(coordinates), gather(after, coordinates)
        )
        done += base.info(name).nbytes
        progress(done, total)
