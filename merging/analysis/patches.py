"""The differences of two merged models on one base, from their patches alone.

A patch holds exactly the coordinates in which a merged model differs from its base. So the
models differ at a coordinate that only one patch holds, and at one that both hold with
different bits. The base is not read; memory holds the kept weights of one tensor.
"""

import numpy as np

from restitch.merging.files.sparse import SparseFile
from restitch.merging.numerics.bitwise import as_integers
from restitch.merging.order import by_bytes


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
    one, other = (patch.coordinates(name).numpy() for patch in (first, second))
    places = np.searchsorted(other, one)
    places[places == len(other)] = 0  # past the end: the first coordinate is never equal
    shared = other[places] == one
    bits = as_integers(first.values(name)), as_integers(second.values(name))
    equal = int((bits[0][shared] == bits[1][places[shared]]).sum())
    return len(one) + len(other) - int(shared.sum()) - equal
