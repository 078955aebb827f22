"""Elementwise merge methods: one rule for each coordinate, streamed over all weights.

A rule receives the members' task vectors on a range of a tensor and returns the merged task vector
in their type; it may overwrite one of them and return it. The merged weight is the base plus that,
computed in the working type and rounded once. Where the merged task vector is 0, the base's bits
stay. Members are ordered by the UTF-8 bytes of their task. The result does not depend on the
ranges, so it is the same on every machine.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.numerics.bitwise import as_integers
from restitch.merging.numerics.rounding import cast, cast_into, round_once
from restitch.merging.order import by_bytes
from restitch.merging.ranking.member_vector import BLOCK, MemberVector, working_dtype

Floats = NDArray[Any]


@dataclass(frozen=True)
class Range:
    """Consecutive coordinates of one tensor.

    Attributes:
        name: the tensor.
        start: the first coordinate.
        vectors: the task vectors there of the members that have the tensor, each with its member
            number. A rule may overwrite them.
    """

    name: str
    start: int
    vectors: Sequence[tuple[int, Floats]]


Rule = Callable[[Range], Floats]


def ranges(base: Checkpoint, vectors: Sequence[MemberVector], name: str) -> Iterator[Range]:
    """Members' task vectors on one tensor, in order; a range is valid until the next one."""
    readers = [(i, vector.reader(name)) for i, vector in enumerate(vectors) if name in vector]
    start = 0
    for piece in torch.split(base.tensor(name).view(-1), BLOCK):
        before = cast(piece, working_dtype(piece.dtype)).numpy()
        yield Range(name, start, [(number, reader.read(before)) for number, reader in readers])
        start += piece.numel()


class Elementwise:
    """The edits of a rule.

    Args:
        base: the base's checkpoint.
        vectors: the members' task vectors, in order.
        rule: merges them on a range.
    """

    def __init__(self, base: Checkpoint, vectors: Sequence[MemberVector], rule: Rule) -> None:
        self._base = base
        self._vectors = tuple(vectors)
        self._rule = rule
        self.names = tuple(sorted({n for v in vectors for n in v.names}, key=by_bytes))

    def apply(self, name: str, flat: Tensor) -> None:
        """Overwrite weights in a flat copy of the base's tensor."""
        self.editor(name)(flat)

    def editor(self, name: str) -> Callable[[Tensor], None]:
        """A function that edits the parts of a tensor in order."""
        readers = [(i, v.reader(name)) for i, v in enumerate(self._vectors) if name in v]
        start, room = 0, torch.empty(0)

        def edit(part: Tensor) -> None:
            nonlocal start, room
            wide = working_dtype(part.dtype)
            if room.numel() < min(BLOCK, part.numel()) or room.dtype != wide:
                room = torch.empty(min(BLOCK, part.numel()), dtype=wide)
            for piece in torch.split(part, BLOCK):
                cast_into(room, piece)
                before = room.numpy()[: piece.numel()]
                taken = [(number, reader.read(before)) for number, reader in readers]
                change = self._rule(Range(name, start, taken))
                np.add(before, change, out=before, casting="no")
                after = round_once(room[: piece.numel()], piece.dtype)
                # Where nothing changes, zeros must keep their sign.
                _replace(as_integers(piece), as_integers(after), change != 0)
                start += piece.numel()

        return edit


def _replace(bits: NDArray[Any], by: NDArray[Any], where: NDArray[np.bool_]) -> None:
    """`np.copyto` on bits, without a branch for each element; overwrites `by`."""
    by ^= bits
    by &= all_bits(where, bits.dtype)
    bits ^= by


def all_bits(mask: NDArray[np.bool_], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Integers with all bits set where the mask is true, and 0 elsewhere."""
    narrow = mask.view(np.int8)
    return np.negative(narrow).astype(dtype)


def sum_vectors(vectors: Sequence[tuple[int, Floats]], *, reuse: bool = False) -> Floats:
    """The sum of members' task vectors, in the order of the members.

    Args:
        vectors: the task vectors, each with its member number.
        reuse: overwrite the first with the sum.
    """
    return sum_arrays([vector for _, vector in vectors], reuse=reuse)


def sum_arrays(arrays: Sequence[Floats], *, reuse: bool = False) -> Floats:
    """The sum of arrays, in order; `reuse` overwrites the first with the sum."""
    result = arrays[0] if reuse else arrays[0].copy()
    for array in arrays[1:]:
        result += array
    return result


def scale_in_place(vector: Floats, alpha: float) -> Floats:
    """Multiply a vector by `alpha` in place, and return it."""
    vector *= alpha
    return vector
