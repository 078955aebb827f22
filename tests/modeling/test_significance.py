"""Whether two models differ on the same rows, by hand and against slow oracles."""

import math
import random
from itertools import takewhile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from restitch.merging.numerics.bisection import smallest
from restitch.modeling.significance import (
    compare_right,
    right_ratio_bound,
    right_ratio_interval,
)


def rows(text: str) -> np.ndarray:
    return np.array([letter == "1" for letter in text])


def test_a_difference_by_hand() -> None:
    found = compare_right(rows("1100000000"), rows("1011111000"))
    assert (found.gained, found.lost, found.rows) == (5, 1, 10)
    assert found.difference == pytest.approx(0.4)
    # Six rows that only one has right: 2 * (1 + 6) / 2^6, without half of both sixes.
    assert found.p_value == pytest.approx((14 - 6) / 64)
    assert not found.is_significant
    # Half a row in each cell: 5.5 and 1.5 of 12.
    centre = 4 / 12
    half = 1.959963984540054 * math.sqrt(7 / 12 - centre**2) / math.sqrt(12)
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half))


def test_the_test_and_the_interval_rarely_disagree() -> None:
    draw = np.random.default_rng(1)
    agree = 0
    for _ in range(300):
        one, other = draw.random(80) < 0.8, draw.random(80) < 0.68
        found = compare_right(one, other)
        agree += found.is_significant is not (found.low <= 0 <= found.high)
    assert agree >= 285


def test_ten_gained_rows_and_none_lost_are_significant() -> None:
    found = compare_right(np.zeros(50, bool), np.arange(50) < 10)
    assert found.p_value == pytest.approx(1 / 2**10)
    assert found.is_significant
    assert found.low > 0


def test_the_same_model_does_not_differ_and_its_interval_has_a_width() -> None:
    found = compare_right(rows("1101"), rows("1101"))
    assert (found.difference, found.p_value) == (0.0, 1.0)
    assert found.low < 0 < found.high


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_the_test_is_binomial_and_two_sided(pairs: list[tuple[bool, bool]]) -> None:
    one, other = (np.array(side) for side in zip(*pairs, strict=True))
    found, back = compare_right(one, other), compare_right(other, one)
    gained = sum(b and not a for a, b in pairs)
    lost = sum(a and not b for a, b in pairs)
    cases = [math.comb(gained + lost, k) / 2 ** (gained + lost) for k in range(gained + lost + 1)]
    less = min(gained, lost)
    expected = 1.0 if gained == lost else 2 * sum(cases[:less]) + cases[less]
    assert found.p_value == pytest.approx(expected)
    assert back.p_value == pytest.approx(found.p_value)
    assert back.difference == -found.difference
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))
    assert found.low <= found.difference * len(pairs) / (len(pairs) + 2) <= found.high


def test_intervals_cover_the_truth_as_often_as_stated() -> None:
    draw = np.random.default_rng(0)
    inside = of_ratio = 0
    for _ in range(400):
        shared = draw.random(200)
        one = shared < 0.8
        other = np.where(draw.random(200) < 0.3, draw.random(200), shared) < 0.7
        found = compare_right(one, other)
        inside += found.low <= -0.1 <= found.high
        low, high = right_ratio_interval(one, other) or (0.0, 0.0)
        of_ratio += low <= 0.7 / 0.8 <= high
    assert 0.92 <= inside / 400 <= 0.98
    assert 0.92 <= of_ratio / 400 <= 0.98


def test_the_bound_of_a_ratio_by_hand() -> None:
    # 8 and 7 of 10 rows are right, 6 of them in both; half a row is added to 8 and to 7.
    found = right_ratio_bound(rows("1111111100"), rows("1111110010"))
    error = math.sqrt(1 / 8.5 + 1 / 7.5 - 2 * 6 / (8.5 * 7.5))
    assert found == pytest.approx(7 / 8 * math.exp(-1.6448536269514722 * error))


def test_the_bound_of_a_ratio_is_above_the_truth_as_rarely_as_stated() -> None:
    draw = np.random.default_rng(0)
    above = 0
    for _ in range(400):
        shared = draw.random(200)
        one = shared < 0.8
        other = np.where(draw.random(200) < 0.3, draw.random(200), shared) < 0.7
        above += (right_ratio_bound(one, other) or 0.0) > 0.7 / 0.8
    assert 0.02 <= above / 400 <= 0.08


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_the_bound_lies_between_the_interval_and_the_ratio(pairs: list[tuple[bool, bool]]) -> None:
    one, other = (np.array(side) for side in zip(*pairs, strict=True))
    interval, bound = right_ratio_interval(one, other), right_ratio_bound(one, other)
    assert (interval is None) == (bound is None)
    if interval is not None and bound is not None:
        assert interval[0] < bound < other.sum() / one.sum()


@given(
    right=st.lists(st.booleans(), min_size=1, max_size=60).filter(any),
    draw=st.randoms(use_true_random=False),
    target=st.floats(0.05, 1.0),
)
def test_if_rows_stay_right_bisection_is_a_walk_down_to_the_first_failure(
    right: list[bool], draw: random.Random, target: float
) -> None:
    whole = np.array(right)
    # Each row is right from some step on, if the whole model has it right.
    since = np.array([draw.randrange(12) for _ in right])

    def supports(step: int) -> bool:
        return (right_ratio_bound(whole, whole & (since <= step)) or 0.0) >= target

    walk = list(takewhile(supports, range(11, -1, -1)))
    assert smallest(range(12), supports) == (walk[-1] if walk else None)


def test_a_ratio_without_right_rows_has_no_interval() -> None:
    assert right_ratio_interval(rows("000"), rows("010")) is None
    assert right_ratio_interval(rows("010"), rows("000")) is None


def test_the_same_model_has_ratio_one_inside_of_its_interval() -> None:
    low, high = right_ratio_interval(rows("11100"), rows("11100")) or (0.0, 0.0)
    assert low < 1 < high
    assert low == pytest.approx(1 / high)
