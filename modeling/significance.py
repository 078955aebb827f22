"""Paired comparison of two models on the same rows, from the correctness of each row.

The test is McNemar's with the mid-p value, in which the observed case counts half: the exact test
is so conservative that it contradicts the intervals (Fagerland et al. 2013). The 95 % intervals
are those of Agresti and Min (2005) for a difference of shares, and of the delta method on the
logarithm for a ratio. A difference of values that are no shares has Newcombe's interval (1998),
which is made from the intervals of the two values.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.05

_Z = 1.959963984540054  # the normal quantile of 0.975


@dataclass(frozen=True)
class Paired:
    """Two models on the same rows.

    Attributes:
        difference: the second model's share of correct rows minus the first's.
        low: the lower end of its 95 % interval; `high` is the upper one.
        p_value: of the hypothesis that both shares are equal.
        gained: rows that only the second model has right.
        lost: rows that only the first model has right.
    """

    difference: float
    low: float
    high: float
    p_value: float
    gained: int
    lost: int
    rows: int

    @property
    def is_significant(self) -> bool:
        """True if chance alone would rarely make such a difference."""
        return self.p_value < LEVEL


def compare_rows(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Paired:
    """Compare two models by whether each has each row right.

    Raises:
        ValueError: the rows differ, or there are none.
    """
    if first.shape != second.shape or not len(first):
        raise ValueError("only models on the same rows can be compared row by row")
    gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
    rows = len(first)
    # Half a row in each cell keeps the interval honest where all rows agree.
    more, less, count = gained + 0.5, lost + 0.5, rows + 2
    centre = (more - less) / count
    half = _Z * math.sqrt((more + less) / count - centre**2) / math.sqrt(count)
    return Paired(
        difference=(gained - lost) / rows,
        low=max(-1.0, centre - half),
        high=min(1.0, centre + half),
        p_value=_mcnemar(gained, lost),
        gained=gained,
        lost=lost,
        rows=rows,
    )


def ratio_interval(
    base: NDArray[np.bool_], merged: NDArray[np.bool_]
) -> tuple[float, float] | None:
    """The 95 % interval of the merged model's share of correct rows over that of the base.

    None if either has no row right: the ratio then has no interval.
    """
    if base.shape != merged.shape:
        raise ValueError("only models on the same rows can be compared row by row")
    both = int((base & merged).sum())
    one, other = int(base.sum()), int(merged.sum())
    if one == 0 or other == 0:
        return None
    first, second = one + 0.5, other + 0.5  # half a row in each cell, as above
    variance = 1 / first + 1 / second - 2 * both / (first * second)
    centre, half = math.log(other / one), _Z * math.sqrt(variance)
    return math.exp(centre - half), math.exp(centre + half)


def difference_interval(
    first: float, first_ends: tuple[float, float], second: float, second_ends: tuple[float, float]
) -> tuple[float, float]:
    """The 95 % interval of the second value minus the first, from their own intervals.

    It ignores that both models were measured on the same rows, and so is rather too wide.
    """
    difference = second - first
    below = math.hypot(second - second_ends[0], first_ends[1] - first)
    above = math.hypot(second_ends[1] - second, first - first_ends[0])
    return difference - below, difference + above


def rows_of(evaluation: Mapping[str, object]) -> NDArray[np.bool_]:
    """One boolean per row, from a stored evaluation."""
    return unpacked(bytes.fromhex(str(evaluation["correct"])), int(str(evaluation["count"])))


def unpacked(correct: bytes, count: int) -> NDArray[np.bool_]:
    """One boolean per row, from one bit per row, most significant first."""
    bits = np.unpackbits(np.frombuffer(correct, dtype=np.uint8), count=count)
    return bits.astype(np.bool_)


def _mcnemar(gained: int, lost: int) -> float:
    if gained == lost:
        return 1.0
    from scipy.stats import binom  # slow to import

    less, both = min(gained, lost), gained + lost
    return float(2 * binom.cdf(less, both, 0.5) - binom.pmf(less, both, 0.5))
