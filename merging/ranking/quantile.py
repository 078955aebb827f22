"""The k-th largest of a model's worth of scores, and which coordinates reach it.

A `Cut` says of any range of a tensor which coordinates are among the k largest, ties to the
lower coordinate, without a list of them: what `restitch.merging.ranking.top_k` writes down, this decides anew
where it is read, which is cheaper where k is a large share of a model. A sample gives a bracket
that almost surely holds the k-th score; one pass counts what is above it and, value by value,
what is inside; where equal scores have to be divided, a second pass finds the place. Scores are
never negative; those that are 0 are never among the largest.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from restitch.merging.files.coordinate_codec import true_positions
from restitch.merging.numerics.rounding import SERIAL
from restitch.merging.order import by_bytes
from restitch.merging.ranking.top_k import SAMPLE, SAMPLE_BLOCK, Scores

Floats = NDArray[Any]
_THREADS = 2
_RANGE = 1 << 20  # scores that are looked at before those in the bracket are counted


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

    def trim(self, name: str, start: int, vector: Floats) -> None:
        """Write 0 to what is not kept of a range, the scores being absolute values.

        Args:
            name: the tensor.
            start: position of the first coordinate in it.
            vector: the coordinates.
        """
        if name == self.name and start <= self.position < start + len(vector):
            vector[~self.keeps(name, start, np.absolute(vector))] = 0
            return
        limit = vector.dtype.type(self.value)
        place = (by_bytes(name), start)
        if self.name is None or place <= (by_bytes(self.name), self.position):
            limit = np.nextafter(limit, vector.dtype.type(0))  # values that equal it stay
        for piece in torch.split(torch.from_numpy(vector), SERIAL):
            torch.hardshrink(piece, float(limit), out=piece)


def kth_largest(scores: Scores, k: int) -> Cut:
    """Where the k largest positive scores end; all positive ones where there are fewer.

    Args:
        scores: non-negative, floor 0.
        k: how many to keep.
    """
    if k <= 0:
        return Cut(math.inf)
    for low, high in _brackets(scores, k):
        above, tallies = _count(scores, low, high)
        values, counts = _merge_tallies(tallies)
        if above < k <= above + int(counts.sum()):
            break
    else:
        return Cut(0.0)
    upward = np.cumsum(counts[::-1])
    at = int(np.searchsorted(upward, k - above))
    value = values[::-1][at]
    beyond = int(upward[at]) - (k - above)
    if not beyond:
        return Cut(float(value))
    return _cut_ties(scores, tallies, value, int(counts[::-1][at]) - beyond)


def _brackets(scores: Scores, k: int) -> Iterator[tuple[float, float]]:
    """Ranges (low, high] to look for the k-th score in; together they hold all positive ones."""
    total = sum(scores.numel(name) for name in scores.names)
    # A tensor by itself is not worth as large a sample as a model.
    size = min(SAMPLE, max(total >> 4, 1 << 14))
    stride = max(1, total // size) * SAMPLE_BLOCK
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


@dataclass(frozen=True)
class _Tally:
    """The values inside a bracket in a range of a tensor that begins at `start`."""

    name: str
    start: int
    values: Floats
    counts: NDArray[np.intp]

    def count(self, value: Any) -> int:
        """How often a value is there."""
        at = int(np.searchsorted(self.values, value))
        return int(self.counts[at]) if at < len(self.values) and self.values[at] == value else 0


def _count(scores: Scores, low: float, high: float) -> tuple[int, list[_Tally]]:
    """How many scores are above a bracket, and what is inside it, in order."""

    def look(name: str) -> tuple[int, list[_Tally]]:
        above = start = done = 0
        inside: list[Floats] = []
        tallies = []
        for chunk in scores.chunks(name):
            array = chunk.numpy()
            over, wanted = array > high, array > low
            above += int(np.count_nonzero(over))
            wanted ^= over
            inside.append(array[true_positions(wanted)])
            done += len(array)
            if done - start >= _RANGE or done == scores.numel(name):
                values, counts = np.unique(np.concatenate(inside), return_counts=True)
                tallies.append(_Tally(name, start, values, counts))
                start = done
                inside.clear()
        return above, tallies

    if len(scores.names) == 1:
        seen = [look(scores.names[0])]
    else:
        with ThreadPoolExecutor(_THREADS) as pool:
            seen = list(pool.map(look, scores.names))
    return sum(above for above, _ in seen), [one for _, tallies in seen for one in tallies]


def _merge_tallies(tallies: Sequence[_Tally]) -> tuple[Floats, NDArray[np.int64]]:
    """All values, rising, and how often each occurs."""
    every = np.concatenate([np.empty(0, np.float32), *(one.values for one in tallies)])
    often = np.concatenate([np.empty(0, np.int64), *(one.counts for one in tallies)])
    values, places = np.unique(every, return_inverse=True)
    totals = np.zeros(len(values), dtype=np.int64)
    np.add.at(totals, places, often)
    return values, totals


def _cut_ties(scores: Scores, tallies: Sequence[_Tally], value: Any, wanted: int) -> Cut:
    """The cut that keeps the first `wanted` of the scores that equal a value."""
    for tally in tallies:
        there = tally.count(value)
        if there < wanted:
            wanted -= there
            continue
        start = 0
        for chunk in scores.chunks(tally.name):
            if start >= tally.start:
                ties = np.flatnonzero(chunk.numpy() == value)
                if len(ties) >= wanted:
                    return Cut(float(value), tally.name, start + int(ties[wanted - 1]))
                wanted -= len(ties)
            start += chunk.numel()
    raise AssertionError("the scores changed while they were read")
