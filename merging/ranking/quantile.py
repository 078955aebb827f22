"""The k-th largest of a model's scores, and the selection of the coordinates that reach it.

A `Cut` decides for any range of a tensor which coordinates are among the k largest, with ties to
the lower coordinate. `top_k` stores a list of them instead; a `Cut` is cheaper if k is a large
share of a model. A sample gives a bracket that almost surely contains the k-th score. One pass
counts the scores above the bracket and, value by value, those inside. Differences of 16-bit weights
take few values, so the most frequent one is not collected but only counted. If only some of the
equal scores are kept, a second pass finds the last of them. Scores must not be negative; a score
of 0 is never among the largest.
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
_RANGE = 1 << 20  # scores to read before the values inside the bracket are counted


@dataclass(frozen=True)
class Cut:
    """The boundary of the k largest scores.

    Attributes:
        value: the smallest kept score; 0 keeps all positive scores.
        name: the tensor with the last kept score of this value; all such scores in tensors before
            it are kept, and none in tensors after it. None keeps all of them.
        position: the position of that score in its tensor.
    """

    value: float
    name: str | None = None
    position: int = 0

    def keeps(self, name: str, start: int, scores: Floats) -> NDArray[np.bool_]:
        """True for each score of a range that is kept.

        Args:
            name: the tensor.
            start: the position of the first score in the tensor.
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
        """Set the entries of a range to 0 whose absolute values are not kept.

        Args:
            name: the tensor.
            start: the position of the first entry in the tensor.
            vector: the entries.
        """
        if name == self.name and start <= self.position < start + len(vector):
            vector[~self.keeps(name, start, np.absolute(vector))] = 0
            return
        limit = vector.dtype.type(self.value)
        place = (by_bytes(name), start)
        if self.name is None or place <= (by_bytes(self.name), self.position):
            limit = np.nextafter(limit, vector.dtype.type(0))  # keeps values equal to the limit
        for piece in torch.split(torch.from_numpy(vector), SERIAL):
            torch.hardshrink(piece, float(limit), out=piece)


def kth_largest(scores: Scores, k: int) -> Cut:
    """The cut that keeps the k largest positive scores, or all if there are fewer.

    Args:
        scores: scores of at least 0, with floor 0.
        k: the number to keep.
    """
    if k <= 0:
        return Cut(math.inf)
    for bracket in _brackets(scores, k):
        above, tallies = _count(scores, bracket)
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


@dataclass(frozen=True)
class _Bracket:
    """The scores above `low` up to `high`, `frequent` of which is probably the most frequent."""

    low: float
    high: float
    frequent: float


def _brackets(scores: Scores, k: int) -> Iterator[_Bracket]:
    """Brackets to search for the k-th score, which together cover all positive ones."""
    total = sum(scores.numel(name) for name in scores.names)
    # Of a single tensor a smaller sample leaves no more to count than it saves to select.
    size = min(SAMPLE, max(total >> 7, 1 << 14))
    stride = max(1, total // size) * SAMPLE_BLOCK
    pieces = [scores.sample(name, stride, SAMPLE_BLOCK).numpy() for name in scores.names]
    sample = np.concatenate([np.empty(0, np.float32), *pieces])
    expected = len(sample) * k / max(total, 1)
    slack = 6 * math.sqrt(expected) + 2
    top, bottom = math.floor(expected - slack), math.ceil(expected + slack)
    # Only these two need their places in the order.
    if places := [len(sample) - rank for rank in (top, bottom) if 0 < rank <= len(sample)]:
        sample.partition(places)
    high = float(sample[-top]) if 0 < top <= len(sample) else math.inf
    low = float(sample[-bottom]) if bottom <= len(sample) else 0.0
    if low < high:
        # One step lower, so that the low value itself is inside the range.
        low = max(float(np.nextafter(sample.dtype.type(low), -np.inf)), 0.0)
        yield _bracket(sample, low, high)
        if high < math.inf:
            yield _bracket(sample, high, math.inf)
        if low > 0:
            yield _bracket(sample, 0.0, low)
    else:
        yield _bracket(sample, 0.0, math.inf)


def _bracket(sample: Floats, low: float, high: float) -> _Bracket:
    values, counts = np.unique(sample[(sample > low) & (sample <= high)], return_counts=True)
    return _Bracket(low, high, float(values[counts.argmax()]) if len(values) else high)


@dataclass(frozen=True)
class _Tally:
    """The values inside a bracket, in the range of a tensor that starts at `start`."""

    name: str
    start: int
    values: Floats
    counts: NDArray[np.intp]

    def count(self, value: Any) -> int:
        """The number of occurrences of a value."""
        at = int(np.searchsorted(self.values, value))
        return int(self.counts[at]) if at < len(self.values) and self.values[at] == value else 0


def _count(scores: Scores, bracket: _Bracket) -> tuple[int, list[_Tally]]:
    """The number of scores above a bracket, and the tallies of those inside it, in order."""

    def count_tensor(name: str) -> tuple[int, list[_Tally]]:
        above = start = done = equal = 0
        inside: list[Floats] = []
        tallies = []
        for chunk in scores.chunks(name):
            array = chunk.numpy()
            over, in_bracket = array > bracket.high, array > bracket.low
            above += int(np.count_nonzero(over))
            in_bracket ^= over
            frequent = array == bracket.frequent
            equal += int(np.count_nonzero(frequent))
            in_bracket ^= frequent
            inside.append(array[true_positions(in_bracket)])
            done += len(array)
            if done - start >= _RANGE or done == scores.numel(name):
                values, counts = np.unique(np.concatenate(inside), return_counts=True)
                at = int(np.searchsorted(values, bracket.frequent))
                values = np.insert(values, at, bracket.frequent)
                tallies.append(_Tally(name, start, values, np.insert(counts, at, equal)))
                start, equal = done, 0
                inside.clear()
        return above, tallies

    if len(scores.names) == 1:
        counted = [count_tensor(scores.names[0])]
    else:
        with ThreadPoolExecutor(_THREADS) as pool:
            counted = list(pool.map(count_tensor, scores.names))
    return sum(above for above, _ in counted), [one for _, tallies in counted for one in tallies]


def _merge_tallies(tallies: Sequence[_Tally]) -> tuple[Floats, NDArray[np.int64]]:
    """All values in rising order, and the number of occurrences of each."""
    every = np.concatenate([np.empty(0, np.float32), *(one.values for one in tallies)])
    often = np.concatenate([np.empty(0, np.int64), *(one.counts for one in tallies)])
    values, places = np.unique(every, return_inverse=True)
    totals = np.zeros(len(values), dtype=np.int64)
    np.add.at(totals, places, often)
    return values, totals


def _cut_ties(scores: Scores, tallies: Sequence[_Tally], value: Any, left: int) -> Cut:
    """The cut that keeps the first `left` of the scores that are equal to a value."""
    for tally in tallies:
        count = tally.count(value)
        if count < left:
            left -= count
            continue
        start = tally.start
        for chunk in scores.chunks(tally.name, start):
            ties = np.flatnonzero(chunk.numpy() == value)
            if len(ties) >= left:
                return Cut(float(value), tally.name, start + int(ties[left - 1]))
            left -= len(ties)
            start += chunk.numel()
    raise AssertionError("the scores changed while they were read")
