"""Shares of right rows: their intervals, and the paired comparison of two models.

The test is McNemar's with the mid-p value, in which the observed case counts half: the exact test
is so conservative that it contradicts the intervals (Fagerland et al. 2013). The 95 % intervals
are Wilson's for a share, those of Agresti and Min (2005) for a difference of shares, and those of
the delta method on the logarithm for a ratio, which also has a one-sided bound. `row_values` has
the rows of other metrics.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.05

_Z = 1.959963984540054  # the normal quantile of 0.975
_Z_ONE_SIDED = 1.6448536269514722  # of 0.95


@dataclass(frozen=True)
class Paired:
    """Two models on the same rows.

    Attributes:
        difference: the second model's value minus the first's.
        low: the lower end of its 95 % interval; `high` is the upper one.
        p_value: of the hypothesis that both models are equally good.
        gained: rows on which only the second model is right, or on which it is better.
        lost: rows on which only the first model is right, or on which it is better.
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


def compare_right(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Paired:
    """Compare two models by whether each has each of the same rows right."""
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


def right_ratio_interval(
    first: NDArray[np.bool_], second: NDArray[np.bool_]
) -> tuple[float, float] | None:
    """The 95 % interval of the second model's share of right rows over that of the first.

    None if either has no row right: the ratio then has no interval.
    """
    found = _log_ratio(first, second)
    if found is None:
        return None
    centre, error = found
    return math.exp(centre - _Z * error), math.exp(centre + _Z * error)


def right_ratio_bound(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float | None:
    """The lower bound of that ratio, one-sided with 95 % confidence; None likewise."""
    found = _log_ratio(first, second)
    return None if found is None else math.exp(found[0] - _Z_ONE_SIDED * found[1])


def _log_ratio(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> tuple[float, float] | None:
    """The logarithm of the ratio and its standard error."""
    both = int((first & second).sum())
    one, other = int(first.sum()), int(second.sum())
    if one == 0 or other == 0:
        return None
    below, above = one + 0.5, other + 0.5  # half a row in each cell, as above
    variance = 1 / below + 1 / above - 2 * both / (below * above)
    return math.log(other / one), math.sqrt(variance)


def wilson(successes: float, count: int) -> tuple[float, float]:
    """Compute Wilson's 95 % interval of a share."""
    share, square = successes / count, _Z * _Z
    centre = share + square / (2 * count)
    half = _Z * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    scale = 1 + square / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def _mcnemar(gained: int, lost: int) -> float:
    """The p-value of McNemar's test with the mid-p correction, from whole numbers: exact."""
    if gained == lost:
        return 1.0
    less, both = min(gained, lost), gained + lost
    ways = up_to = 1  # to choose `less` rows out of both, and to choose as many or fewer
    for number in range(1, less + 1):
        ways = ways * (both - number + 1) // number
        up_to += ways
    return (2 * up_to - ways) / (1 << both)
