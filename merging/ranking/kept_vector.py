"""The task vector of a member's delta: finetuned minus base at the kept coordinates.

It is 0 elsewhere; for a delta of density 1 it is the whole task vector over the localizable
tensors. It is read range by range together with the base, so nothing of the size of a model is
allocated. Computed in float32 if the base has 16 bits, in float64 otherwise.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.sparse import Cursor, SparseFile
from restitch.merging.files.whole_weights import WholeWeights
from restitch.merging.numerics.rounding import cast, cast_into
from restitch.merging.ranking.member_vector import BLOCK, Floats, MemberVector, working_dtype
from restitch.merging.ranking.top_k import strided_sample


class KeptVector(MemberVector):
    """The task vector of a sparse delta."""

    def __init__(self, base: Checkpoint, delta: SparseFile | WholeWeights) -> None:
        super().__init__(base, delta)
        self._delta = delta

    def reader(self, name: str) -> "KeptReader":
        """A reader of the task vector of a tensor, one range after the other."""
        delta = self._delta
        if isinstance(delta, SparseFile) and not self._keeps_all(name):
            return KeptReader(cursor=delta.cursor(name))
        return KeptReader(delta.values(name))

    def difference(self, name: str) -> Tensor:
        """The task vector of one tensor, in its shape."""
        before = self.base.tensor(name).view(-1)
        wide = cast(before, working_dtype(before.dtype)).numpy()
        difference = torch.from_numpy(self.reader(name).read(wide))
        return difference.view(self.shape(name))

    def chunks(self, name: str, start: int = 0) -> Iterator[Tensor]:
        """|task vector| of a tensor from a position on; a chunk is valid until the next one."""
        reader, flat = self.reader(name), self.base.tensor(name).view(-1)[start:]
        reader.skip(start)
        wide = torch.empty(min(BLOCK, flat.numel()), dtype=working_dtype(flat.dtype))
        for part in torch.split(flat, BLOCK):
            cast_into(wide, part)
            taken = reader.read(wide.numpy()[: part.numel()])
            yield torch.from_numpy(np.absolute(taken, out=taken))

    def sample(self, name: str, stride: int, block: int) -> Tensor:
        """|task vector| at the first `block` of every `stride` coordinates."""
        flat = self.base.tensor(name).view(-1)
        wide = working_dtype(flat.dtype)
        if not self._keeps_all(name):
            return strided_sample(self.difference(name).view(-1).abs(), stride, block)
        sides = [strided_sample(f, stride, block) for f in (self._delta.values(name), flat)]
        after, before = (cast(side, wide).numpy() for side in sides)
        return torch.from_numpy(np.absolute(after - before))

    def _keeps_all(self, name: str) -> bool:
        info = self._delta.info(name)
        return info.kept == info.numel


class KeptReader:
    """Reads the task vector of one tensor, range by range.

    Args:
        values: all finetuned values, or
        cursor: those at the kept coordinates.
    """

    def __init__(self, values: Tensor | None = None, cursor: Cursor | None = None) -> None:
        self._values = values
        self._cursor = cursor
        self._start = 0
        self._room = torch.empty(0)

    def skip(self, count: int) -> None:
        """Pass over the next coordinates."""
        self._start += count
        if self._cursor is not None:
            self._cursor.advance(count)

    def read(self, before: Floats) -> Floats:
        """The task vector at the next coordinates, in memory that the next call reuses.

        Args:
            before: the base's weights there, in the working type.
        """
        wide = torch.from_numpy(before).dtype
        if self._cursor is None:
            assert self._values is not None
            stop = self._start + len(before)
            if self._room.numel() < len(before) or self._room.dtype != wide:
                self._room = torch.empty(len(before), dtype=wide)
            cast_into(self._room, self._values[self._start : stop])
            self._start = stop
            array: Floats = self._room.numpy()[: len(before)]
            array -= before
            return array
        array = np.zeros_like(before)
        for coordinates, values in self._cursor.advance(len(before)):
            array[coordinates] = cast(values, wide).numpy() - before[coordinates]
        return array
