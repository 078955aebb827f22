"""Selection of exactly the k largest scores of a model, out of core.

`top_k` keeps the k coordinates with the largest scores; ties go to the lower coordinate
(tensors by name, then position). No array of the model's size is allocated: a sample gives
a threshold that is almost surely low enough, one pass collects the candidates above it in
scratch files, and a radix selection over the candidates finds the exact k-th score. If the
threshold was too high, the pass is repeated with a lower one. Scores must not be NaN; the
result depends on them alone, not on chunks, threads or the sample.
"""

import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from restitch.merging.files.coordinate_codec import true_positions
from restitch.merging.files.mask import Mask, WholeMask
from restitch.merging.numerics.bitwise import as_integers
from restitch.merging.order import by_bytes
from restitch.merging.progress import Progress, ignore

SAMPLE = 1 << 20
SAMPLE_BLOCK = 64
_BLOCK = 1 << 20
_DIGIT = 16


class Scores(Protocol):
    """The input of `top_k`: one score for each coordinate of some tensors."""

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors, sorted by their UTF-8 bytes."""

    @property
    def score_dtype(self) -> torch.dtype:
        """float32, or float64 if a score needs it."""

    @property
    def floor(self) -> float:
        """A lower bound of all scores; scores equal to it are never collected."""

    def numel(self, name: str) -> int:
        """The number of scores of a tensor."""

    def chunks(self, name: str, start: int = 0) -> Iterator[Tensor]:
        """The scores of a tensor from a position on; a chunk is valid until the next one."""

    def sample(self, name: str, stride: int, block: int) -> Tensor:
        """About `block` scores in every `stride`, always the same ones."""


class TensorScores:
    """Scores in memory: any finite floats."""

    def __init__(self, scores: dict[str, Tensor]) -> None:
        self.names = tuple(sorted(scores, key=by_bytes))
        wide = any(value.dtype == torch.float64 for value in scores.values())
        self.score_dtype = torch.float64 if wide else torch.float32
        self._scores = {
            name: scores[name].detach().cpu().reshape(-1).to(self.score_dtype)
            for name in self.names
        }
        least = [float(value.min()) for value in self._scores.values() if value.numel()]
        self.floor = min(least, default=0.0)

    def numel(self, name: str) -> int:
        """The number of scores of a tensor."""
        return self._scores[name].numel()

    def chunks(self, name: str, start: int = 0) -> Iterator[Tensor]:
        """The scores of a tensor from a position on."""
        yield from torch.split(self._scores[name][start:], _BLOCK)

    def sample(self, name: str, stride: int, block: int) -> Tensor:
        """The first `block` of every `stride` scores."""
        return strided_sample(self._scores[name], stride, block)


def strided_sample(flat: Tensor, stride: int, block: int) -> Tensor:
    """The first `block` of every `stride` elements; the first `block` of a short tensor."""
    rows = flat.numel() // stride
    if not rows:
        return flat[:block]
    # Through numpy, which copies in the calling thread (see `rounding`).
    bits = as_integers(flat)[: rows * stride].reshape(rows, stride)[:, :block]
    return torch.from_numpy(np.ascontiguousarray(bits).reshape(-1)).view(flat.dtype)


def strided_positions(count: int, stride: int, block: int) -> Tensor:
    """The positions that `strided_sample` takes of `count` elements."""
    rows = count // stride
    if not rows:
        return torch.arange(min(block, count))
    return (torch.arange(rows)[:, None] * stride + torch.arange(block)).view(-1)


def top_k(
    scores: Scores, k: int, *, scratch: Path | None = None, progress: Progress | None = None
) -> Mask:
    """The mask of the k largest scores.

    Args:
        scores: the scores to rank.
        k: the number to keep, from 0 to the number of scores.
        scratch: the folder for temporary files of about 8 bytes per kept coordinate; they
            have no name and are removed together with the mask.
        progress: called with the scores done and the total.
    """
    total = sum(scores.numel(name) for name in scores.names)
    if not 0 <= k <= total:
        raise ValueError(f"cannot keep {k} of {total} coordinates")
    if k in (0, total):
        return WholeMask({name: scores.numel(name) for name in scores.names if k})
    for threshold in _thresholds(scores, k, total):
        candidates = _collect(scores, k, threshold, scratch, progress or ignore)
        if candidates.total >= k:
            return _select(candidates, k)
    return _fill(candidates, k)


def _thresholds(scores: Scores, k: int, total: int) -> Iterator[float]:
    """Thresholds to try, in falling order; the last one is just above the floor."""
    dtype = np.float64 if scores.score_dtype == torch.float64 else np.float32
    last = float(np.nextafter(dtype(scores.floor), dtype(np.inf)))
    stride = max(1, total // SAMPLE) * SAMPLE_BLOCK
    pieces = [scores.sample(name, stride, SAMPLE_BLOCK).numpy() for name in scores.names]
    sample = np.sort(np.concatenate(pieces).astype(dtype, copy=False))
    expected = len(sample) * k / total
    tried = math.inf
    for slack in (1.05, 1.5):
        rank = math.ceil(slack * expected + 6 * math.sqrt(expected) + 1)
        if rank <= len(sample) and last < sample[-rank] < tried:
            tried = float(sample[-rank])
            yield tried
    yield last


@dataclass(frozen=True)
class _CandidateSpan:
    """One tensor's candidates: their start in the scratch files, and their number."""

    begin: int
    count: int
    numel: int


class _Candidates:
    """Positions and ordered keys of the scores that reached a threshold, on disk."""

    def __init__(self, scratch: Path | None, wide: bool, long: bool) -> None:
        self.key_dtype = np.dtype(np.uint64 if wide else np.uint32)
        self.position_dtype = np.dtype(np.uint64 if long else np.uint32)
        self.parts: dict[str, _CandidateSpan] = {}
        self.total = 0
        # No `with`: the mask reads from the files as long as it exists.
        self._keys: IO[bytes] = tempfile.TemporaryFile(dir=scratch, buffering=0)  # noqa: SIM115
        self._positions: IO[bytes] = tempfile.TemporaryFile(dir=scratch, buffering=0)  # noqa: SIM115

    def append(self, positions: NDArray[Any], keys: NDArray[Any]) -> None:
        _write(self._positions, positions.astype(self.position_dtype))
        _write(self._keys, keys)
        self.total += len(keys)

    def keys(self, begin: int, count: int) -> NDArray[Any]:
        return _read(self._keys, self.key_dtype, begin, count)

    def positions(self, name: str) -> NDArray[np.int64]:
        part = self.parts[name]
        return _read(self._positions, self.position_dtype, part.begin, part.count).astype(np.int64)

    def key_blocks(self, begin: int = 0, count: int | None = None) -> Iterator[NDArray[Any]]:
        end = self.total if count is None else begin + count
        for start in range(begin, end, _BLOCK):
            yield self.keys(start, min(_BLOCK, end - start))


def _write(file: IO[bytes], array: NDArray[Any]) -> None:
    data = array.data.cast("B") if len(array) else memoryview(b"")
    while data:
        data = data[file.write(data) :]


def _read(file: IO[bytes], dtype: np.dtype[Any], begin: int, count: int) -> NDArray[Any]:
    array = np.empty(count, dtype=dtype)
    data, at = array.data.cast("B") if count else memoryview(b""), begin * dtype.itemsize
    while data:
        got = os.preadv(file.fileno(), [data], at)
        if not got:
            raise OSError("a scratch file is shorter than the data written to it")
        data, at = data[got:], at + got
    return array


def _collect(
    scores: Scores, k: int, threshold: float, scratch: Path | None, progress: Progress
) -> _Candidates:
    """Collect the scores that reach the threshold.

    Scores equal to the threshold are collected only until there are k candidates: later ones
    would lose every tie, and there may be very many (bf16 differences take few values).
    """
    wide = scores.score_dtype == torch.float64
    long = any(scores.numel(name) > 1 << 32 for name in scores.names)
    candidates = _Candidates(scratch, wide, long)
    limit = np.float64(threshold) if wide else np.float32(threshold)
    total, done = sum(scores.numel(name) for name in scores.names), 0
    for name in scores.names:
        begin, start = candidates.total, 0
        for chunk in scores.chunks(name):
            array = chunk.to(scores.score_dtype).numpy()
            reached = array >= limit if candidates.total < k else array > limit
            positions = true_positions(reached)
            if len(positions):
                candidates.append(positions + start, _ordered(array[positions]))
            start += len(array)
            progress(done + start, total)
        candidates.parts[name] = _CandidateSpan(begin, candidates.total - begin, scores.numel(name))
        done += start
    return candidates


def _ordered(values: NDArray[Any]) -> NDArray[Any]:
    """Unsigned integers in the order of the floats; both zeros map to the same integer."""
    if values.itemsize == 8:
        wide = (values + np.float64(0)).view(np.int64)  # + 0 turns -0 into 0
        return wide.view(np.uint64) ^ ((wide >> 63).view(np.uint64) | np.uint64(1 << 63))
    narrow = (values + np.float32(0)).view(np.int32)
    return narrow.view(np.uint32) ^ ((narrow >> 31).view(np.uint32) | np.uint32(1 << 31))


def _select(candidates: _Candidates, k: int) -> Mask:
    key, ties = _kth(candidates, k)
    counts: dict[str, int] = {}
    quota: dict[str, int] = {}
    for name, part in candidates.parts.items():
        above = equal = 0
        for keys in candidates.key_blocks(part.begin, part.count):
            above += int(np.count_nonzero(keys > key))
            equal += int(np.count_nonzero(keys == key))
        quota[name] = min(equal, ties)
        ties -= quota[name]
        counts[name] = above + quota[name]

    def load(name: str) -> Tensor:
        part = candidates.parts[name]
        keys = candidates.keys(part.begin, part.count)
        keep = keys > key
        keep[np.flatnonzero(keys == key)[: quota[name]]] = True
        return torch.from_numpy(candidates.positions(name)[keep])

    return Mask(counts, load)


def _kth(candidates: _Candidates, k: int) -> tuple[Any, int]:
    """The k-th largest key, and the number of kept coordinates with exactly that key."""
    dtype = candidates.key_dtype
    bits = dtype.itemsize * 8
    prefix, rank = 0, k
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        counts = np.zeros(1 << _DIGIT, dtype=np.int64)
        for block in candidates.key_blocks():
            keys = block
            if shift + _DIGIT < bits:
                keys = block[block >> dtype.type(shift + _DIGIT) == dtype.type(prefix)]
            digits = (keys >> dtype.type(shift)) & dtype.type((1 << _DIGIT) - 1)
            counts += np.bincount(digits.astype(np.int64), minlength=1 << _DIGIT)
        from_top = np.cumsum(counts[::-1])
        place = int(np.searchsorted(from_top, rank))
        rank -= int(from_top[place - 1]) if place else 0
        prefix = prefix << _DIGIT | ((1 << _DIGIT) - 1 - place)
    return dtype.type(prefix), rank


def _fill(candidates: _Candidates, k: int) -> Mask:
    """All candidates, filled up to k with the lowest coordinates at the floor."""
    left = k - candidates.total
    counts: dict[str, int] = {}
    for name, part in candidates.parts.items():
        extra = min(left, part.numel - part.count)
        counts[name] = part.count + extra
        left -= extra

    def load(name: str) -> Tensor:
        part = candidates.parts[name]
        keep = np.zeros(part.numel, dtype=np.bool_)
        keep[candidates.positions(name)] = True
        keep[np.flatnonzero(~keep)[: counts[name] - part.count]] = True
        return torch.from_numpy(np.flatnonzero(keep))

    return Mask(counts, load)
