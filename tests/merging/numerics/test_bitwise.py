"""Weights are read and set at coordinates bit for bit."""

from typing import Any

import numpy as np
import pytest
import torch

from restitch.merging.numerics.bitwise import gather, scatter
from restitch.merging.numerics.rounding import SERIAL

BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("width", [np.int32, np.int64])
def test_scatter_sets_the_bits_at_each_coordinate_and_no_others(
    dtype: torch.dtype, width: type[np.signedinteger[Any]]
) -> None:
    generator, bits = np.random.default_rng(0), BITS[dtype]
    count = 2 * SERIAL + 3  # three pieces
    coordinates = np.sort(generator.choice(2 * count, count, replace=False))
    raw = generator.bytes(3 * count * bits.itemsize)  # with NaN payloads
    stored = torch.frombuffer(bytearray(raw), dtype=bits)
    before, values = stored[: 2 * count], stored[2 * count :]
    expected = before.numpy().copy()
    expected[coordinates] = values.numpy()
    flat = before.view(dtype).clone()
    scatter(flat, coordinates.astype(width), values.view(dtype))
    assert np.array_equal(flat.view(bits).numpy(), expected)
    assert torch.equal(gather(flat, coordinates).view(bits), values)


def test_scatter_rounds_once() -> None:
    flat = torch.zeros(3, dtype=torch.bfloat16)
    # Just above the middle of 1 and 1 + 2^-7: through float32 it would be rounded to 1.
    scatter(flat, np.array([2]), torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64))
    assert flat.tolist() == [0, 0, 1 + 2**-7]
    with pytest.raises(RuntimeError, match="out of bounds"):
        scatter(flat, np.array([3]), torch.ones(1))
