"""The task vector of a member, however its delta keeps it.

It is read range by range together with the base, or tensor by tensor. Computed in float32 if the
base has 16 bits, in float64 otherwise.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.delta import Delta
from restitch.merging.numerics.factors import Factors

Floats = NDArray[Any]

# Weights per step: few enough for the cache, and enough that two threads seldom wait for each other
# at the interpreter's lock.
BLOCK = 1 << 18


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which weights of type `dtype` are merged, before one rounding."""
    return torch.float32 if dtype.itemsize == 2 else torch.float64


class Reader(Protocol):
    """Reads the task vector of one tensor, range by range."""

    def read(self, before: Floats) -> Floats:
        """The task vector at the next coordinates, in memory that the next call may reuse.

        Args:
            before: the base's weights there, in the working type.
        """


class MemberVector(ABC):
    """The task vector of one member; its absolute values are `top_k.Scores`.

    Args:
        base: the base's checkpoint.
        delta: the member's delta on that base.
    """

    floor = 0.0

    def __init__(self, base: Checkpoint, delta: Delta) -> None:
        self.base = base
        self.names = delta.names
        self._infos = {name: delta.info(name) for name in delta.names}
        types = {working_dtype(base.info(name).dtype) for name in self.names}
        self.score_dtype = torch.float64 if torch.float64 in types else torch.float32

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def numel(self, name: str) -> int:
        """The number of coordinates of a tensor."""
        return self._infos[name].numel

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._infos[name].shape

    def low_rank(self, name: str) -> Factors | None:
        """The factors of a tensor; None if its task vector is not kept as such."""
        return None

    @abstractmethod
    def reader(self, name: str) -> Reader:
        """A reader of the task vector of a tensor, one range after the other."""

    @abstractmethod
    def difference(self, name: str) -> Tensor:
        """The task vector of one tensor, in its shape."""

    @abstractmethod
    def chunks(self, name: str, start: int = 0) -> Iterator[Tensor]:
        """|task vector| of a tensor from a position on; a chunk is valid until the next one."""

    @abstractmethod
    def sample(self, name: str, stride: int, block: int) -> Tensor:
        """|task vector| at the first `block` of every `stride` coordinates."""
