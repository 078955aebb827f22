"""The choice of triplets against all other choices."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from restitch.merging.ranking.allotment import ranks_by_budget, ranks_by_share


def test_triplets_with_the_most_norm_per_number_come_first() -> None:
    squares = {"a": np.array([9.0, 1.0]), "b": np.array([8.0, 4.0, 0.0])}
    costs = {"a": 3, "b": 2}  # 9/3, 1/3 and 8/2, 4/2: the order is b, a, b, a
    assert [ranks_by_budget(squares, costs, n) for n in (1, 2, 5, 7, 9)] == [
        {"a": 0, "b": 0},
        {"a": 0, "b": 1},
        {"a": 1, "b": 1},
        {"a": 1, "b": 2},
        {"a": 1, "b": 2},
    ]
    assert ranks_by_share(squares, costs, 8 / 22) == {"a": 0, "b": 1}
    assert ranks_by_share(squares, costs, 17 / 22) == {"a": 1, "b": 1}
    assert ranks_by_share(squares, costs, 1.0) == {"a": 2, "b": 2}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(0.01, 10), min_size=1, max_size=3), min_size=1, max_size=3),
    st.floats(0.05, 0.99),
)
def test_no_other_ranks_of_equal_costs_hold_more(spectra: list[list[float]], share: float) -> None:
    squares = {str(i): np.sort(np.array(each))[::-1] for i, each in enumerate(spectra)}
    costs = dict.fromkeys(squares, 1)
    ranks = ranks_by_share(squares, costs, share)

    def held(chosen: dict[str, int]) -> float:
        return float(sum(squares[name][:rank].sum() for name, rank in chosen.items()))

    total = sum(float(each.sum()) for each in squares.values())
    assert held(ranks) >= share * total * (1 - 1e-9)
    count = sum(ranks.values())
    for other in product(*(range(len(each) + 1) for each in squares.values())):
        chosen = dict(zip(squares, other, strict=True))
        if sum(other) == count:
            assert held(ranks) >= held(chosen) - 1e-9
        if sum(other) < count:
            assert held(chosen) < share * total * (1 + 1e-9)
    assert ranks == ranks_by_budget(squares, costs, count)


def test_nothing_to_keep_gives_ranks_of_0() -> None:
    assert ranks_by_share({"a": np.zeros(2)}, {"a": 1}, 1.0) == {"a": 0}
    assert ranks_by_budget({"a": np.zeros(2)}, {"a": 1}, 9) == {"a": 0}


@pytest.mark.parametrize("budget", [0, 1])
def test_a_budget_below_the_cheapest_triplet_keeps_nothing(budget: int) -> None:
    assert ranks_by_budget({"a": np.ones(2)}, {"a": 2}, budget) == {"a": 0}
