"""Stitching: one merged model from the base and the members' sparse deltas.

Deltas hold finetuned values, so a coordinate with one owner needs no arithmetic: the merged
weight is the finetuned one, cast once to the base's type (bit for bit the same if the types
are equal). On a shared coordinate it is by default the mean over the owners, summed in
float64 in the order of the members and rounded once; the other rules are in `overlaps`.
Members are ordered by the UTF-8 bytes of their task, so the order of registration does not
matter. Tensors are computed on demand.
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
from restitch.merging.files.coordinate_codec import differing_positions, true_positions
from restitch.merging.files.delta import Delta
from restitch.merging.files.edits import Edits
from restitch.merging.files.sparse import Piece, SparseFile, SparseInfo, SparseTensor, write_sparse
from restitch.merging.numerics.bitwise import as_integers, gather, scatter
from restitch.merging.numerics.rounding import cast
from restitch.merging.order import by_bytes
from restitch.merging.progress import Progress, ignore
from restitch.merging.rules.overlaps import MEAN, RULES, Floats, Owner, Rule
from restitch.merging.rules.settings import check_choice

VERSION = 1
OVERLAPS = (MEAN, *RULES)

_BLOCK = 1 << 19

# The importance of a tensor's rows and columns to a member, if its delta has it.
_Factors = tuple[Floats, Floats] | None


@dataclass(frozen=True)
class DeltaMember:
    """One model in a merged version.

    Attributes:
        task: its task.
        delta: its sparse delta, or the subspace of its task vector.
        statistics: the statistics that the method needs in addition, by `Method.needs`.
    """

    task: str
    delta: Delta
    statistics: Mapping[str, Checkpoint] = field(default_factory=dict)


def stitch(base: Checkpoint, members: Iterable[DeltaMember], overlap: str | Rule = MEAN) -> Edits:
    """The edits that turn the base into the merged model.

    Args:
        base: the base's checkpoint.
        members: the members in any order, each task once.
        overlap: the rule for shared coordinates: one of `OVERLAPS`, of which `mean` is the
            paper's, or a method's own rule.
    """
    if isinstance(overlap, str):
        check_choice("overlap", overlap, OVERLAPS)
    rule = RULES.get(overlap) if isinstance(overlap, str) else overlap
    return _Stitched(ordered_members(base, members), rule)


def write_patch(
    path: Path,
    base: Checkpoint,
    edits: Edits,
    metadata: Mapping[str, str],
    progress: Progress | None = None,
    names: Sequence[str] | None = None,
    *,
    packed: bool = False,
) -> SparseInfo:
    """Write the coordinates whose bytes differ from the base's, with their new values.

    The patch is a function of the base and the merged model alone. With `names`, which are some of
    the edited tensors in order, it is a part of it: `join_sparse` makes the whole from its parts.
    `packed` makes bfloat16 values smaller; see `write_sparse`.
    """
    changes = differences(base, edits, progress or ignore, names)
    return write_sparse(path, changes, kind="patch", metadata=metadata, packed=packed)


def split_names(base: Checkpoint, names: Iterable[str], limit: int) -> tuple[tuple[str, ...], ...]:
    """Split tensors into ranges, each of at most `limit` bytes of the base, or of one tensor.

    The ranges depend on names and sizes alone, not on the files of the base.
    """
    ranges: list[list[str]] = [[]]
    size = 0
    for name in names:
        nbytes = base.info(name).nbytes
        if ranges[-1] and size + nbytes > limit:
            ranges.append([])
            size = 0
        ranges[-1].append(name)
        size += nbytes
    return tuple(map(tuple, ranges))


def ordered_members(base: Checkpoint, members: Iterable[DeltaMember]) -> list[DeltaMember]:
    """The members in the order of their tasks.

    Raises:
        BadInput: a delta does not fit the base.
    """
    ordered = sorted(members, key=lambda member: by_bytes(member.task))
    if len({member.task for member in ordered}) != len(ordered):
        raise ValueError("two members have the same task")
    for member in ordered:
        check_fit(base, member.task, member.delta)
    return ordered


def check_fit(base: Checkpoint, task: str, delta: Delta) -> None:
    """Raise `BadInput` if a file is not a delta with tensors of the base in the same shapes."""
    wrong = [
        f"{name}: base {list(base.info(name).shape) if name in base else 'has none'}, "
        f"delta {list(delta.info(name).shape)}"
        for name in delta.names
        if name not in base or base.info(name).shape != delta.info(name).shape
    ]
    if wrong or delta.kind != "delta":
        raise BadInput(
            f"the delta of {task!r} does not fit the base {base.path}",
            expected="a delta with only tensors of the base, in the same shapes",
            found=f"a {delta.kind} ({delta.path})",
            hint="localize the member again on this base",
            details=wrong,
        )


def sparse_delta(member: DeltaMember) -> SparseFile:
    """The sparse delta of a member.

    Raises:
        BadInput: the member is kept as a subspace, or as a whole.
    """
    if isinstance(member.delta, SparseFile):
        return member.delta
    raise BadInput(
        f"{member.task} keeps no mask, and masks are needed here",
        expected="members that were localized by masks",
        found=f"a subspace or whole weights ({member.delta.path})",
        hint="choose a method for whole task vectors, or a line with another localize: mode",
    )


class _Stitched:
    """The edits of `stitch`: members in order, and a rule or None for the mean."""

    def __init__(self, members: Sequence[DeltaMember], rule: Rule | None) -> None:
        self._deltas = tuple(sparse_delta(member) for member in members)
        self._rule = rule
        names = {name for delta in self._deltas for name in delta.names}
        self.names = tuple(sorted(names, key=by_bytes))
        self._own = threading.local()

    def apply(self, name: str, flat: Tensor) -> None:
        """Overwrite the owned coordinates of a flat copy of the base's tensor."""
        self.editor(name)(flat)

    def editor(self, name: str) -> Callable[[Tensor], None]:
        """A function that edits the parts of a tensor in order."""
        deltas = [delta for delta in self._deltas if name in delta]
        if len(deltas) == 1:
            return deltas[0].editor(name)
        cursors = [delta.cursor(name) for delta in deltas]
        factors = [_factors(delta, name) for delta in deltas]
        block: _Block | None = getattr(self._own, "block", None)
        if block is None:
            block = self._own.block = _Block(len(self._deltas))
        start = 0

        def edit(part: Tensor) -> None:
            nonlocal start
            for piece in torch.split(part, _BLOCK):
                taken = [cursor.advance(piece.numel()) for cursor in cursors]
                if self._rule is None:
                    block.average(piece, taken)
                else:
                    block.apply_rule(piece, start, taken, self._rule, factors)
                start += piece.numel()

        return edit


def _factors(delta: SparseFile, name: str) -> _Factors:
    factors = delta.factors(name)
    if factors is None:
        return None
    rows, columns = (cast(side, torch.float64).numpy() for side in factors)
    return rows, columns


def _importance(factors: _Factors, coordinates: NDArray[np.int64]) -> Floats | None:
    if factors is None:
        return None
    rows, columns = factors
    row, column = np.divmod(coordinates, len(columns))
    return np.asarray(rows[row] * columns[column])


class _Block:
    """Stitches ranges of at most `_BLOCK` weights, which fit a core's cache."""

    def __init__(self, members: int) -> None:
        self._ones = torch.ones(_BLOCK, dtype=torch.uint8 if members < 256 else torch.int16)
        self._owners = torch.empty_like(self._ones)
        self._totals = torch.zeros(_BLOCK, dtype=torch.float64)

    def average(self, flat: Tensor, members: Sequence[Sequence[Piece]]) -> None:
        """Overwrite owned weights, with the mean on shared coordinates."""
        pieces = [piece for taken in members for piece in taken]
        owners, shared = self._shared(flat.numel(), pieces)
        for coordinates, values in pieces:
            scatter(flat, coordinates, values)
        if not len(shared):
            return
        totals = self._totals[: flat.numel()]
        totals.numpy()[shared] = 0
        for coordinates, values in pieces:
            # Add everywhere, which is faster than a selection; only shared places are read.
            index = torch.from_numpy(coordinates)
            totals.scatter_add_(0, index, cast(values, torch.float64))
        means = totals.numpy()[shared] / owners[shared]
        scatter(flat, shared, torch.from_numpy(means))

    def apply_rule(
        self,
        flat: Tensor,
        start: int,
        members: Sequence[Sequence[Piece]],
        rule: Rule,
        factors: Sequence[_Factors],
    ) -> None:
        """Overwrite owned weights of the base in `flat`, by the rule on shared coordinates."""
        owners, shared = self._shared(flat.numel(), [p for taken in members for p in taken])
        before = cast(gather(flat, shared), torch.float64).numpy()
        column = np.empty(flat.numel() if len(shared) else 0, dtype=np.int64)
        column[shared] = np.arange(len(shared))
        claims = []
        for taken, own_factors in zip(members, factors, strict=True):
            for coordinates, values in taken:
                scatter(flat, coordinates, values)
                chosen = owners[coordinates] > 1
                own = coordinates[chosen]
                places = column[own]
                after = cast(gather(values, np.flatnonzero(chosen)), torch.float64).numpy()
                claims.append(
                    Owner(places, after - before[places], _importance(own_factors, own + start))
                )
        if len(shared):
            scatter(flat, shared, torch.from_numpy(rule(before, claims)))

    def _shared(
        self, size: int, pieces: Sequence[Piece]
    ) -> tuple[NDArray[np.integer[Any]], NDArray[np.int64]]:
        """The number of owners of each weight, and the coordinates with several."""
        owners = self._owners[:size]
        owners.numpy().fill(0)  # in this thread; torch would start others
        for coordinates, _ in pieces:
            index = torch.from_numpy(coordinates)
            owners.scatter_add_(0, index, self._ones[: len(coordinates)])
        return owners.numpy(), true_positions(owners.numpy() > 1)


def differences(
    base: Checkpoint, edits: Edits, progress: Progress, names: Sequence[str] | None = None
) -> Iterator[SparseTensor]:
    """The weights of edited tensors whose bytes differ from the base's, tensor by tensor.

    `names` are some of the edited tensors, in order; all by default.
    """
    names = edits.names if names is None else names
    total, done = sum(base.info(name).nbytes for name in names), 0
    for name in names:
        before = base.tensor(name).view(-1)
        old = as_integers(before)
        new = old.copy()
        after = torch.from_numpy(new).view(before.dtype)
        edits.apply(name, after)
        coordinates = differing_positions(old, new)
        yield SparseTensor(
            name, base.info(name).shape, torch.from_numpy(coordinates), gather(after, coordinates)
        )
        done += base.info(name).nbytes
        progress(done, total)
