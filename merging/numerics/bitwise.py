"""Bitwise access to weights: gather and scatter at coordinates, and views as integers.

Written values are rounded once to the type of the target. If the types are equal, bit
patterns stay unchanged, including NaN payloads and negative zeros.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from restitch.merging.numerics.rounding import SERIAL, round_once

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_integers(flat: Tensor) -> NDArray[Any]:
    """The bit patterns of a flat tensor of weights, in the same memory."""
    # Numpy has no bfloat16, and compares and copies integers exactly.
    return flat.view(_INTEGERS[flat.dtype.itemsize]).numpy()


def gather(flat: Tensor, coordinates: NDArray[np.int64]) -> Tensor:
    """flat[coordinates], bit for bit."""
    return torch.from_numpy(as_integers(flat)[coordinates]).view(flat.dtype)


def scatter(flat: Tensor, coordinates: NDArray[np.integer[Any]], values: Tensor) -> None:
    """flat[coordinates] = values, each rounded once.

    Numpy would convert coordinates of 32 bits one by one, which takes three times as long. Short
    pieces keep torch in the calling thread.
    """
    target = flat.view(_INTEGERS[flat.dtype.itemsize])
    bits = round_once(values, flat.dtype).view(target.dtype)
    for start in range(0, len(coordinates), SERIAL):
        piece = slice(start, start + SERIAL)
        target.scatter_(0, torch.from_numpy(coordinates[piece]).long(), bits[piece])
