"""The differences of two merged models on one base, from their patches alone.

A patch holds exactly the coordinates in which a merged model differs from its base. So the
models differ at a coordinate that only one patch holds, and at one that both hold with
different bits. The base is not read; memory holds a range of one tensor.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from restitch.merging.files.sparse import Cursor, SparseFile
from restitch.merging.numerics.bitwise import as_integers
from restitch.merging.order import by_bytes

_RANGE = 1 << 16  # weights per step: few enough for a core's cache


def count_differences(first: SparseFile, second: SparseFile) -> dict[str, int]:
    """The number of weights that differ, by tensor; tensors without a difference are omitted."""
    counts = {}
    for name in sorted({*first.names, *second.names}, key=by_bytes):
        count = _count(first, second, name)
        if count:
            counts[name] = count
    return counts


def _count(first: SparseFile, second: SparseFile, name: str) -> int:
    if name not in first or name not in second:
        return (first if name in first else second).info(name).kept
    cursors, count = (first.cursor(name), second.cursor(name)), 0
    numel, integers = first.info(name).numel, np.dtype(f"i{first.info(name).dtype.itemsize}")
    for start in range(0, numel, _RANGE):
        length = min(_RANGE, numel - start)
        (held, bits), (also_held, others) = (_range(c, length, integers) for c in cursors)
        count += int(np.count_nonzero((held != also_held) | (bits != others)))
    return count


def _range(
    cursor: Cursor, length: int, integers: np.dtype[Any]
) -> tuple[NDArray[np.bool_], NDArray[Any]]:
    """The kept coordinates in the next elements, and their bits, which are 0 elsewhere."""
    held, bits = np.zeros(length, dtype=np.bool_), np.zeros(length, dtype=integers)
    for coordinates, values in cursor.advance(length):
        held[coordinates] = True
        bits[coordinates] = as_integers(values)
    return held, bits
