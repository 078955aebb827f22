from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from restitch.merging.numerics.rounding import round_once

BITS = {torch.bfloat16: (8, -133), torch.float16: (11, -24)}
LARGEST = {dtype: Fraction(torch.finfo(dtype).max) for dtype in BITS}


def rounded(value: Fraction, dtype: torch.dtype) -> float:
    """The reference: nearest multiple of the last place, ties to even, in exact arithmetic."""
    if not value:
        return 0.0
    bits, least = BITS[dtype]
    exponent = 0
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    place = Fraction(2) ** max(exponent - bits + 1, least)
    nearest = round(value / place) * place  # Python rounds ties of fractions to even
    if abs(nearest) > LARGEST[dtype]:
        return float("inf") if value > 0 else -float("inf")
    return float(nearest)


def check(value: float, dtype: torch.dtype) -> None:
    found = round_once(torch.tensor([value], dtype=torch.float64), dtype)
    assert found.dtype == dtype
    assert float(found[0]) == rounded(Fraction(value), dtype)


@pytest.mark.parametrize("dtype", BITS)
@settings(max_examples=200)
@given(data=st.data())
def test_every_value_is_rounded_once(data: st.DataObject, dtype: torch.dtype) -> None:
    value = data.draw(st.floats(allow_nan=False, allow_infinity=False))
    check(value, dtype)
    # The middle between two neighbours, and a little to either side of it.
    bits, least = BITS[dtype]
    exponent = data.draw(st.integers(max(least + bits, -120), 15))
    middle = 2.0**exponent * (
        1 + (2 * data.draw(st.integers(0, 2 ** (bits - 1) - 1)) + 1) / 2**bits
    )
    for shift in (0, 2.0**-30, -(2.0**-30), 2.0**-52, -(2.0**-52)):
        check(middle * (1 + shift), dtype)
        check(-middle * (1 + shift), dtype)


def test_torch_alone_rounds_twice_here() -> None:
    value = torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=torch.float64)
    assert float(value.to(torch.bfloat16)[0]) == 1.0
    assert float(round_once(value, torch.bfloat16)[0]) == 1 + 2.0**-7


@pytest.mark.parametrize("dtype", [*BITS, torch.float32, torch.float64])
def test_exact_values_are_unchanged(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -0.0, 1.5, -2.0, torch.inf, -torch.inf], dtype=torch.float64)
    found = round_once(values, dtype)
    assert torch.equal(found.double(), values)
    assert torch.equal(torch.signbit(found), torch.signbit(values))
