"""The k-th largest of a model's worth of scores, and which coordinates reach it.

A `Cut` says of any range of a tensor which coordinates are among the k largest, ties to the
lower coordinate, without a list of them: what `merging.top_k` writes down, this decides anew
where it is read, which is cheaper where k is a large share of a model. A sample gives a bracket
that almost surely holds the k-th score; one pass counts what is above it and, value by value,
what is inside; where equal scores have to be divided, a second pass finds the place. Scores are
never negative; those that are 0 are never among the largest.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merging.checkpoint import by_bytes
from merging.top_k import SAMPLE, SAMPLE_BLOCK, Scores

Floats = NDArray[Any]
_THREADS = 2


@dataclass(frozen=True)
class Cut:
    """Which scores are among the k largest.

    Attributes:
        value: the smallest score that is kept; 0 keeps all that are positive.
        name: the tensor in which the last kept score of this value lies; of tensors before it all
            such scores are kept, of tensors behind it none. None keeps all of them.
        position: where in that tensor.
    """

    value: float
    name: str | None = None
    position: int = 0

    def keeps(self, name: str, start: int, scores: Floats) -> NDArray[np.bool_]:
        """Which scores of a range are kept.

        Args:
            name: the tensor.
            start: position of the first score in it.
            scores: the scores of the range.
        """
        kept: NDArray[np.bool_] = scores > self.value
        if self.value > 0 and (self.name is None or by_bytes(name) <= by_bytes(self.name)):
            ties = scores == self.value
            if name == self.name:
                ties[max(self.position + 1 - start, 0) :] = False
            kept |= ties
        return kept


def kth_largest(scores: Scores, k: int) -> Cut:
    """Where the k largest positive scores end; all positive ones where there are fewer.

    Args:
        scores: non-negative, floor 0.
        k: how many to keep.
    """
    if k <= 0:
        return Cut(math.inf)
    for low, high in _brackets(scores, k):
        above, values, counts = _count(scores, low, high)
        if above < k <= above + int(counts.sum()):
            break
    else:
        return Cut(0.0)
    upward = np.cumsum(counts[::-1])
    at = int(np.searchsorted(upward, k - above))
    value = float(values[::-1][at])
    beyond = int(upward[at]) - (k - above)
    if not beyond:
        return Cut(value)
    return _divided(scores, value, int(counts[::-1][at]) - beyond)


def _brackets(scores: Scores, k: int) -> Iterator[tuple[float, float]]:
    """Ranges (low, high] to look for the k-th score in; together they hold all positive ones."""
    total = sum(scores.numel(name) for name in scores.names)
    stride = max(1, total // SAMPLE) * SAMPLE_BLOCK
    pieces = [scores.sample(name, stride, SAMPLE_BLOCK).numpy() for name in scores.names]
    sample = np.sort(np.concatenate([np.empty(0, np.float32), *pieces]))
    expected = len(sample) * k / max(total, 1)
    slack = 6 * math.sqrt(expected) + 2
    top, bottom = math.floor(expected - slack), math.ceil(expected + slack)
    high = float(sample[-top]) if 0 < top <= len(sample) else math.inf
    low = float(sample[-bottom]) if bottom <= len(sample) else 0.0
    if low < high:
        # The low end belongs to the range: one step below it does not.
        low = max(float(np.nextafter(sample.dtype.type(low), -np.inf)), 0.0)
        yield low, high
        if high < math.inf:
            yield high, math.inf
        if low > 0:
            yield 0.0, low
    else:
        yield 0.0, math.inf


def _count(scores: Scores, low: float, high: float) -> tuple[int, Floats, NDArray[np.int64]]:
    """How many scores are above a range, and the values inside it with how often they occur."""

    def look(name: str) -> tuple[int, list[Floats], list[NDArray[Any]]]:
        above, values, counts = 0, [], []
        for chunk in scores.chunks(name):
            array = chunk.numpy()
            over = array > high
            above += int(np.count_nonzero(over))
            found = np.unique(array[(array > low) & ~over], return_counts=True)
            values.append(found[0])
            counts.append(found[1])
        return above, values, counts

    with ThreadPoolExecutor(_THREADS) as pool:
        seen = list(pool.map(look, scores.names))
    every = np.concatenate([np.empty(0, np.float32), *(v for _, values, _ in seen for v in values)])
    often = np.concatenate([np.empty(0, np.int64), *(c for _, _, counts in seen for c in counts)])
    values, places = np.unique(every, return_inverse=True)
    totals = np.zeros(len(values), dtype=np.int64)
    np.add.at(totals, places, often)
    return sum(above for above, _, _ in seen), values, totals


def _divided(scores: Scores, value: float, wanted: int) -> Cut:
    """The cut that keeps the first `wanted` of the scores that equal a value."""
    for name in scores.names:
        start = 0
        for chunk in scores.chunks(name):
            ties = np.flatnonzero(chunk.numpy() == value)
            if len(ties) >= wanted:
                return Cut(value, name, start + int(ties[wanted - 1]))
            wanted -= len(ties)
            start += chunk.numel()
    raise AssertionError("the scores changed while they were read")
