"""How two merged models on one base differ, from their patches alone.

A patch holds exactly the coordinates in which a merged model differs from its base, so a
coordinate that only one of two patches holds differs between the models, and one that both
hold differs where their bits do. The base is never read; memory holds one tensor's part.
"""

import numpy as np

from restitch.merging.files.sparse import SparseFile
from restitch.merging.numerics.bitwise import as_integers
from restitch.merging.order import by_bytes


def count_differences(first: SparseFile, second: SparseFile) -> dict[str, int]:
    """How many weights differ, by tensor; tensors without one are left out."""
    found = {}
    for name in sorted({*first.names, *second.names}, key=by_bytes):
        count = _count(first, second, name)
        if count:
            found[name] = count
    return found


def _count(first: SparseFile, second: SparseFile, name: str) -> int:
    if name not in first or name not in second:
        return (first if name in first else second).info(name).kept
    one, other = (patch.coordinates(name).numpy() for patch in (first, second))
    places = np.searchsorted(other, one)
    places[places == len(other)] = 0  # past the end: compared with the first, and unequal to it
    shared = other[places] == one
    bits = as_integers(first.values(name)), as_integers(second.values(name))
    equal = int((bits[0][shared] == bits[1][places[shared]]).sum())
    return len(one) + len(other) - int(shared.sum()) - equal
