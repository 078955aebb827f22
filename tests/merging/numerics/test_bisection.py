import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from restitch.merging.numerics.bisection import geometric, smallest


def test_a_case_by_hand() -> None:
    asked: list[int] = []

    def reaches(value: int) -> bool:
        asked.append(value)
        return value >= 30

    assert smallest([10, 20, 30, 40, 50], reaches) == 30
    assert asked == [50, 20, 30]
    assert smallest([7], lambda _: True) == 7
    assert smallest([1, 2], lambda _: False) is None


@given(st.lists(st.integers(1, 10**6), min_size=1, unique=True), st.integers(0, 10**6 + 1))
def test_it_is_the_smallest_that_passes_with_few_evaluations(values: list[int], limit: int) -> None:
    candidates, asked = sorted(values), list[int]()

    def reaches(value: int) -> bool:
        asked.append(value)
        return value >= limit

    assert smallest(candidates, reaches) == next((v for v in candidates if v >= limit), None)
    assert len(asked) <= 1 + math.ceil(math.log2(len(candidates) + 1))


@given(st.integers(1, 10**9), st.integers(1, 10**9))
def test_candidates_rise_from_the_lowest_to_the_highest(one: int, other: int) -> None:
    lowest, highest = sorted((one, other))
    found = geometric(lowest, highest)
    assert found == sorted(set(found))
    assert (found[0], found[-1]) == (lowest, highest)
    assert all(b <= 1.19 * a + 2 for a, b in itertools.pairwise(found))


def test_a_highest_below_the_lowest_is_the_only_candidate() -> None:
    assert geometric(10, 3) == [3]
    assert geometric(1, 16) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 13, 16]
