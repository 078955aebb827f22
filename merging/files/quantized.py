"""Values in 8 bits: the difference of each kept weight from the base, in steps of its row.

The step of a row is its largest difference over 127, in bfloat16. A row is all that shares the
first index; a tensor of one dimension is one row. A restored value is the base plus a whole number
of steps, computed in float64 and rounded once: the same bytes on every machine. Its error is at
most half a step plus a 250th of the row's largest difference.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from restitch.merging.files.header import count_elements
from restitch.merging.numerics.bitwise import gather
from restitch.merging.numerics.rounding import cast, round_once

STEP_DTYPE = torch.bfloat16
_MOST = 127


@dataclass(frozen=True)
class Quantized:
    """The values of some coordinates of one tensor.

    Attributes:
        codes: int8, one per coordinate.
        steps: bfloat16, one per row.
        dtype: the type of the tensor.
    """

    codes: Tensor
    steps: Tensor
    dtype: torch.dtype

    def numel(self) -> int:
        """The number of values."""
        return self.codes.numel()

    def restored(self, coordinates: Tensor, before: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The restored values.

        Args:
            coordinates: the sorted coordinates of the values.
            before: the base's tensor, flat.
            shape: the shape of the whole tensor.
        """
        steps = cast(self.steps, torch.float64).numpy()
        places = coordinates.numpy()
        values = cast(gather(before, places), torch.float64).numpy()
        values += self.codes.numpy() * steps[_rows_of(places, shape)]
        return round_once(torch.from_numpy(values), self.dtype)


def step_count(shape: tuple[int, ...]) -> int:
    """The number of steps of a tensor."""
    return shape[0] if len(shape) > 1 else 1


def quantized(
    coordinates: Tensor, values: Tensor, before: Tensor, shape: tuple[int, ...]
) -> Quantized:
    """Quantize the values of some coordinates to 8 bits.

    Args:
        coordinates: the sorted coordinates.
        values: one finite value for each.
        before: the base's tensor, flat.
        shape: the shape of the whole tensor.
    """
    places = coordinates.numpy()
    difference = cast(values, torch.float64).numpy()
    difference = difference - cast(gather(before, places), torch.float64).numpy()
    rows = _rows_of(places, shape)
    largest = np.zeros(step_count(shape))
    np.maximum.at(largest, rows, np.absolute(difference))
    steps = torch.from_numpy(largest / _MOST).to(torch.float32).to(STEP_DTYPE)
    sizes = cast(steps, torch.float64).numpy()[rows]
    codes = np.divide(difference, sizes, out=np.zeros_like(difference), where=sizes > 0)
    codes = np.rint(codes).clip(-_MOST, _MOST).astype(np.int8)
    return Quantized(torch.from_numpy(codes), steps, values.dtype)


def _rows_of(places: NDArray[np.int64], shape: tuple[int, ...]) -> NDArray[np.int64]:
    return places // (
        count_elements(shape[1:]) if len(shape) > 1 else max(1, count_elements(shape))
    )
