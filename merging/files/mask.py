"""Masks: the kept coordinates of a model.

A `Mask` maps tensor names to sorted coordinates (positions in the flat tensor, int64).
It is immutable and omits tensors without a kept coordinate, so equal masks have equal
digests. The coordinates are in memory, or in a file from which they are read on demand.
"""

import json
from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from restitch.merging.digests import digest_bytes
from restitch.merging.order import by_bytes

_PIECE = 1 << 16  # coordinates that stay in a core's cache until they are hashed


class Mask:
    """Sorted coordinates by tensor name.

    Args:
        counts: the number of kept coordinates of each tensor; tensors with 0 are omitted.
        load: reads the sorted int64 coordinates of one tensor.
    """

    def __init__(self, counts: Mapping[str, int], load: Callable[[str], Tensor]) -> None:
        self._counts = {name: counts[name] for name in sorted(counts, key=by_bytes)}
        self._counts = {name: count for name, count in self._counts.items() if count}
        self._load = load
        self.names = tuple(self._counts)
        self.total = sum(self._counts.values())

    @classmethod
    def of(cls, coordinates: Mapping[str, Tensor]) -> "Mask":
        """A mask in memory; the coordinates must be sorted and distinct."""
        owned = {name: value.to(torch.int64, copy=True) for name, value in coordinates.items()}
        for name, value in owned.items():
            if value.dim() != 1 or bool((value[1:] <= value[:-1]).any()):
                raise ValueError(f"the coordinates of {name!r} are not sorted and distinct")
            if value.numel() and int(value[0]) < 0:
                raise ValueError(f"the coordinates of {name!r} are negative")
        return cls({name: value.numel() for name, value in owned.items()}, owned.__getitem__)

    def count(self, name: str) -> int:
        """The number of kept coordinates of a tensor; 0 if it is not in the mask."""
        return self._counts.get(name, 0)

    def coordinates(self, name: str) -> Tensor:
        """The kept coordinates of a tensor, sorted; do not write to them."""
        if name not in self._counts:
            return torch.empty(0, dtype=torch.int64)
        return self._load(name)

    def digest(self) -> str:
        """The digest of the mask: names, and the coordinates as little-endian int64."""
        lines = [
            json.dumps([name, self._counts[name], self._coordinates_digest(name)])
            for name in self.names
        ]
        return digest_bytes("\n".join(lines).encode())

    def _coordinates_digest(self, name: str) -> str:
        return _digest(self.coordinates(name))


class WholeMask(Mask):
    """The mask that keeps every coordinate of some tensors.

    Args:
        counts: the number of elements of each tensor; empty ones are omitted.
    """

    def __init__(self, counts: Mapping[str, int]) -> None:
        super().__init__(counts, lambda name: torch.arange(counts[name]))

    def _coordinates_digest(self, name: str) -> str:
        return _digest_of_all(self.count(name))


@lru_cache(maxsize=1024)
def _digest_of_all(count: int) -> str:
    """The digest of the coordinates from 0 to `count`; many tensors of a model have one size."""
    hasher = blake3()
    for start in range(0, count, _PIECE):
        piece = np.arange(start, min(start + _PIECE, count), dtype=np.int64)
        hasher.update(piece.data.cast("B"))
    return str(hasher.hexdigest())


def _digest(coordinates: Tensor) -> str:
    return digest_bytes(coordinates.contiguous().numpy().data.cast("B"))
