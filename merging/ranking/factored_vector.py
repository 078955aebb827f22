"""The task vector of a member that is kept as a subspace.

`difference` is what the factors give. Ranges are those of weights: the member's weights are the
base's plus the task vector, rounded to the base's type, as a finetuned model has them. So an
elementwise method gives the same bytes as from a delta with those weights.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.edits import edited
from restitch.merging.files.factor_file import FactorFile
from restitch.merging.numerics.factors import Factors
from restitch.merging.numerics.rounding import cast
from restitch.merging.ranking.member_vector import BLOCK, Floats, MemberVector, working_dtype
from restitch.merging.ranking.top_k import strided_sample


class FactoredVector(MemberVector):
    """The task vector of a delta that keeps factors."""

    def __init__(self, base: Checkpoint, delta: FactorFile) -> None:
        super().__init__(base, delta)
        self._delta = delta

    def low_rank(self, name: str) -> Factors | None:
        """The factors of a tensor; None if it has none."""
        return self._delta.low_rank(name)

    def difference(self, name: str) -> Tensor:
        """The task vector of one tensor, in its shape."""
        return self._delta.difference(name)

    def reader(self, name: str) -> "FactoredReader":
        """A reader of the task vector of a tensor, one range after the other."""
        return FactoredReader(self._weights(name))

    def chunks(self, name: str, start: int = 0) -> Iterator[Tensor]:
        """|task vector| of a tensor from a position on."""
        yield from torch.split(self._rounded(name)[start:].abs_(), BLOCK)

    def sample(self, name: str, stride: int, block: int) -> Tensor:
        """|task vector| at the first `block` of every `stride` coordinates."""
        return strided_sample(self._rounded(name).abs_(), stride, block)

    def _weights(self, name: str) -> Tensor:
        return edited(self.base, self._delta, name).view(-1)

    def _rounded(self, name: str) -> Tensor:
        wide = working_dtype(self.base.info(name).dtype)
        return cast(self._weights(name), wide) - cast(self.base.tensor(name).view(-1), wide)


class FactoredReader:
    """Reads the task vector of one tensor, range by range, from the member's weights."""

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights
        self._start = 0

    def read(self, before: Floats) -> Floats:
        """The task vector at the next coordinates.

        Args:
            before: the base's weights there, in the working type.
        """
        stop = self._start + len(before)
        after = cast(self._weights[self._start : stop], torch.from_numpy(before).dtype)
        self._start = stop
        array: Floats = after.numpy() - before
        return array
