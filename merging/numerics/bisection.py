"""The smallest of some rising candidates that is good enough, with few looks."""

from collections.abc import Callable, Sequence


def geometric(lowest: int, highest: int, per_doubling: int = 4) -> list[int]:
    """Whole numbers from `lowest` to `highest`, both of them, each so much more than the last."""
    if not 0 < lowest <= highest:
        return [highest]
    found, step = {lowest, highest}, 1
    while (value := round(highest * 2 ** (-step / per_doubling))) > lowest:
        found.add(value)
        step += 1
    return sorted(found)


def smallest(candidates: Sequence[int], reaches: Callable[[int], bool]) -> int | None:
    """The smallest candidate that reaches, taking it that larger ones do as well.

    Args:
        candidates: rising, at least one.
        reaches: asked for the largest first, and for about log2 of the others.

    Returns:
        None where not even the largest does. What is returned was asked for.
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
