"""Successive halving: what a tournament asks, and what that costs."""

import math

import pytest

from restitch.tasks.method_selection import LEAST_ROWS, _order, shares_of


@pytest.mark.parametrize("entrants", range(2, 33))
@pytest.mark.parametrize("rows", [1, 60, 130, 250, 500])
def test_the_rows_cost_no_more_than_is_said(entrants: int, rows: int) -> None:
    shares, left, cost = shares_of(entrants, rows), entrants, 0.0
    assert shares[-1] == 1.0
    for share in shares:
        cost += share * left
        left = math.ceil(left / 2)
    assert cost <= entrants + 1
    if len(shares) == math.ceil(math.log2(entrants)):
        assert cost <= 2 * len(shares)
    if len(shares) > 1:
        assert rows * shares[0] >= LEAST_ROWS


def test_what_keeps_too_little_comes_last_and_equals_are_told_by_their_places() -> None:
    found = [
        {"score": 0.9, "meets": False, "retention": 0.5},
        {"score": 0.7, "meets": True, "retention": 0.9},
        {"score": 0.7, "meets": True, "retention": 0.8},
        {"score": 0.95, "meets": False, "retention": 0.4},
    ]
    assert sorted(range(4), key=lambda place: _order(found[place], place)) == [1, 2, 0, 3]
