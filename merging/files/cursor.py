"""Streamed reading of the kept coordinates and values of one tensor."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

# Coordinates, counted from the start of a range, and their values.
Piece = tuple[NDArray[np.int64], Tensor]

_NOWHERE = np.empty(0, dtype=np.int64)


class Cursor:
    """Reads the coordinates and values of a tensor, one range after the other."""

    def __init__(self, blocks: Iterator[NDArray[np.int64]], values: Tensor) -> None:
        self._blocks = blocks
        self._values = values
        self._next = next(blocks, _NOWHERE)
        self._start = 0
        self._done = 0

    def advance(self, count: int) -> list[Piece]:
        """The coordinates in the next `count` elements, counted from the first of them."""
        pieces = []
        stop = self._start + count
        while len(self._next):
            whole = bool(self._next[-1] < stop)
            cut = len(self._next) if whole else int(np.searchsorted(self._next, stop))
            values = self._values[self._done : self._done + cut]
            coordinates = self._next[:cut]
            coordinates -= self._start  # in place: nothing else holds the block
            pieces.append((coordinates, values))
            self._done += cut
            self._next = next(self._blocks, _NOWHERE) if whole else self._next[cut:]
            if not whole:
                break
        self._start = stop
        return pieces
