"""Which singular triplets of several matrices to keep, for the most norm per stored number.

A triplet of a matrix of r rows and c columns costs r + c numbers and holds the square of its
singular value. Of a matrix, larger triplets come first, so the best choice takes all triplets in
the order of square over cost.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from restitch.merging.order import by_bytes

Squares = NDArray[np.float64]


def ranks_by_budget(
    squares: Mapping[str, Squares], costs: Mapping[str, int], budget: int
) -> dict[str, int]:
    """The ranks that hold the most norm in at most `budget` stored numbers.

    Args:
        squares: the squared singular values of each matrix, in falling order.
        costs: the numbers that one triplet of each matrix needs.
        budget: the numbers that all triplets together may need.

    Returns:
        A rank for every matrix; it may be 0.
    """
    ranks = dict.fromkeys(squares, 0)
    left = budget
    for name, _ in _best_first(squares, costs):
        if costs[name] > left:
            break
        left -= costs[name]
        ranks[name] += 1
    return ranks


def ranks_by_share(
    squares: Mapping[str, Squares], costs: Mapping[str, int], share: float
) -> dict[str, int]:
    """The ranks that hold a share of the squared norm of all matrices in the fewest numbers.

    Args:
        squares: the squared singular values of each matrix, in falling order.
        costs: the numbers that one triplet of each matrix needs.
        share: above 0 and at most 1.
    """
    ranks = dict.fromkeys(squares, 0)
    missing = share * sum(float(each.sum()) for each in squares.values())
    for name, square in _best_first(squares, costs):
        if missing <= 0:
            break
        missing -= square
        ranks[name] += 1
    return ranks


def _best_first(
    squares: Mapping[str, Squares], costs: Mapping[str, int]
) -> Sequence[tuple[str, float]]:
    """The matrices and squares of all triplets above 0, best first, equals by name."""
    names = sorted(squares, key=by_bytes)
    found = [
        (-square / costs[name], place, rank, name, square)
        for place, name in enumerate(names)
        for rank, square in enumerate(squares[name].tolist())
        if square > 0
    ]
    return [(name, square) for *_, name, square in sorted(found)]
