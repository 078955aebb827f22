"""Successive halving: the rows that a tournament uses, and their cost."""

import math

import pytest

from restitch.tasks.method_selection import LEAST_ROWS, _order, shares_of


@pytest.mark.parametrize("contestants", range(2, 33))
@pytest.mark.parametrize("rows", [1, 60, 130, 250, 500])
def test_rounds_cost_no_more_than_documented(contestants: int, rows: int) -> None:
    shares, left, cost = shares_of(contestants, rows), contestants, 0.0
    assert shares[-1] == 1.0
    for share in shares:
        cost += share * left
        left = math.ceil(left / 2)
    assert cost <= contestants + 1
    if len(shares) == math.ceil(math.log2(contestants)):
        assert cost <= 2 * len(shares)
    if len(shares) > 1:
        assert rows * shares[0] >= LEAST_ROWS


def test_low_retention_ranks_last_and_equal_scores_keep_their_order() -> None:
    results = [
        {"score": 0.9, "meets": False, "retention": 0.5},
        {"score": 0.7, "meets": True, "retention": 0.9},
        {"score": 0.7, "meets": True, "retention": 0.8},
        {"score": 0.95, "meets": False, "retention": 0.4},
    ]
    assert sorted(range(4), key=lambda index: _order(results[index], index)) == [1, 2, 0, 3]
