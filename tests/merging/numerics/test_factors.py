import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from restitch.merging.numerics.factors import Factors, above_rounding, from_8_bits, in_8_bits


def test_the_product_is_scaled() -> None:
    left, right = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0, 5.0]])
    assert Factors(left, right).product().tolist() == [[3, 4, 5], [6, 8, 10]]
    assert Factors(left, right, 0.5).product().tolist() == [[1.5, 2, 2.5], [3, 4, 5]]


@pytest.mark.parametrize(("left", "right"), [((2, 3), (2, 3)), ((2,), (2, 3)), ((2, 1), (1, 2, 3))])
def test_factors_without_a_product_are_refused(
    left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="have no product"):
        Factors(torch.zeros(left), torch.zeros(right))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**31), st.floats(-12, 4))
def test_8_bits_are_off_by_at_most_a_step(rows: int, columns: int, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator) * 10**size
    codes, steps = in_8_bits(matrix)
    assert codes.dtype == torch.int8
    assert codes.shape == matrix.shape
    # Half a step; the largest number of a column up to a whole one, as its step is rounded.
    assert ((from_8_bits(codes, steps) - matrix).abs() <= 1.0001 * steps.float()).all()


def test_a_column_of_zeros_stays_zero() -> None:
    codes, steps = in_8_bits(torch.tensor([[0.0, 127.0], [0.0, -64.0]]))
    assert from_8_bits(codes, steps).tolist() == [[0, 127], [0, -64]]


def test_singular_values_that_are_rounding_errors_are_found() -> None:
    values = torch.tensor([[1.0, 1e-3, 1e-7, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert above_rounding(values, 4).tolist() == [[True, True, False, False], [False] * 4]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(0, 4), st.integers(1, 9), st.integers(0, 2**31))
def test_numbers_at_positions_and_their_bound_are_those_of_the_product(
    rows: int, rank: int, columns: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=generator)
    right = torch.randn(rank, columns, generator=generator)
    factors = Factors(left, right, -1.5)
    flat = factors.product().view(-1)
    positions = torch.randint(rows * columns, (7,), generator=generator)
    assert torch.allclose(factors.at(positions), flat[positions], rtol=1e-5, atol=1e-6)
    assert float(flat.abs().max()) <= factors.bound() * (1 + 1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_numbers_that_are_not_finite_have_no_bound(bad: float, side: int) -> None:
    sides = [torch.zeros(2, 1), torch.zeros(1, 2)]
    sides[side].view(-1)[1] = bad
    assert not Factors(sides[0], sides[1]).bound() < 1e300
