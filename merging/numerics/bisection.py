"""Bisection: the smallest of some candidates that is good enough, with few evaluations."""

from collections.abc import Callable, Sequence


def geometric(lowest: int, highest: int, per_doubling: int = 4) -> list[int]:
    """Whole numbers from `lowest` to `highest` inclusive, `per_doubling` of them per doubling."""
    if not 0 < lowest <= highest:
        return [highest]
    numbers, step = {lowest, highest}, 1
    while (value := round(highest * 2 ** (-step / per_doubling))) > lowest:
        numbers.add(value)
        step += 1
    return sorted(numbers)


def smallest(candidates: Sequence[int], reaches: Callable[[int], bool]) -> int | None:
    """The smallest candidate that passes a test, assuming that all larger ones pass too.

    Args:
        candidates: at least one, in rising order.
        reaches: the test, called for the largest first and then for about log2 of the others.

    Returns:
        A candidate for which `reaches` was called; None if not even the largest passes.
    """
    if not reaches(candidates[-1]):
        return None
    below, above = -1, len(candidates) - 1  # `above` reaches, `below` does not
    while above - below > 1:
        middle = (below + above) // 2
        if reaches(candidates[middle]):
            above = middle
        else:
            below = middle
    return candidates[above]
