"""Task vectors: finetuned minus base, streamed over the localizable tensors.

The difference is taken in float32 after upcasting both sides (in float64 if either side
is float64); scores are its absolute values. Memory holds at most one tensor, or one chunk
of scores. A task vector is not a set of weights and has a type of its own.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from restitch.merging.errors import CannotJoin
from restitch.merging.files.checkpoint import FLOATING, Checkpoint
from restitch.merging.numerics.bitwise import as_integers
from restitch.merging.numerics.factors import Factors
from restitch.merging.numerics.rounding import SERIAL, cast_into, round_once
from restitch.merging.order import by_bytes
from restitch.merging.ranking.top_k import strided_positions, strided_sample

CHUNK = 1 << 18
_PIECE = 1 << 18  # weights that stay in a core's cache between two steps


@dataclass(frozen=True)
class OutsideShare:
    """The share of the changes of finetuning outside of the localizable tensors.

    Attributes:
        share: the squared norm outside over the whole squared norm, 0 to 1.
        tensors: the tensors outside with their shares, largest first, without those of 0.
    """

    share: float
    tensors: tuple[tuple[str, float], ...]


class TaskVector:
    """The difference of a finetuned checkpoint from its base; it is also `Scores`.

    Args:
        base: the base's checkpoint.
        finetuned: the finetuned one under the base's names (`Checkpoint.renamed`).
        names: the localizable tensors; all must be weights of equal shape on both sides.

    Attributes:
        score_dtype: the type that holds every score exactly, float64 if any needs it.
    """

    floor = 0.0

    def __init__(self, base: Checkpoint, finetuned: Checkpoint, names: Sequence[str]) -> None:
        self.base = base
        self.finetuned = finetuned
        self.names = tuple(sorted(set(names), key=by_bytes))
        for name in self.names:
            b, f = base.info(name), finetuned.info(name)
            if b.shape != f.shape or b.dtype not in FLOATING or f.dtype not in FLOATING:
                raise CannotJoin(
                    f"{name} cannot be localized",
                    expected=f"weights of shape {list(b.shape)}",
                    found=f"base {b.dtype} {list(b.shape)}, finetuned {f.dtype} {list(f.shape)}",
                    hint="save the finetuned model with the tensor shapes and types of its base",
                )
        self._dtypes = {name: self._dtype(name) for name in self.names}
        wide = torch.float64 in self._dtypes.values()
        self.score_dtype = torch.float64 if wide else torch.float32

    @property
    def coordinates(self) -> int:
        """The number of coordinates of all tensors together."""
        return sum(self.numel(name) for name in self.names)

    def numel(self, name: str) -> int:
        """The number of coordinates of a tensor."""
        return self.base.info(name).numel

    def chunks(self, name: str, start: int = 0, size: int = CHUNK) -> Iterator[Tensor]:
        """The scores of a tensor from a position on, in chunks of `size`.

        A chunk is valid until the next one is requested: the buffer is reused.
        """
        sides = self.base.tensor(name), self.finetuned.tensor(name)
        base, finetuned = (side.view(-1)[start:] for side in sides)
        left = torch.empty(min(size, base.numel()), dtype=self._dtypes[name])
        right = torch.empty_like(left)
        for at in range(0, base.numel(), size):
            count = min(size, base.numel() - at)
            cast_into(left, finetuned[at : at + count])
            cast_into(right, base[at : at + count])
            scores = left[:count]
            array = scores.numpy()
            np.subtract(array, right.numpy()[:count], out=array)
            np.absolute(array, out=array)
            yield scores

    def sample(self, name: str, stride: int, block: int) -> Tensor:
        """The scores of the first `block` of every `stride` coordinates.

        Those of a change that is held as factors are computed alone, up to rounding.
        """
        factors = self.finetuned.factors(name)
        if factors is not None:
            return self._of_factors(name, factors, stride, block)
        sides = []
        for checkpoint in (self.finetuned, self.base):
            flat = strided_sample(checkpoint.tensor(name).view(-1), stride, block)
            sides.append(torch.empty(flat.numel(), dtype=self._dtypes[name]))
            cast_into(sides[-1], flat)
        return torch.from_numpy(np.abs(sides[0].numpy() - sides[1].numpy()))

    def _of_factors(self, name: str, factors: Factors, stride: int, block: int) -> Tensor:
        dtype = self._dtypes[name]
        before = strided_sample(self.base.tensor(name).view(-1), stride, block).to(dtype)
        change = factors.at(strided_positions(self.numel(name), stride, block))
        after = round_once(before + change, self.finetuned.info(name).dtype)
        return (after.to(dtype) - before).abs_()

    def difference(self, name: str) -> Tensor:
        """Finetuned minus base of one tensor, in its shape."""
        dtype = self._dtypes[name]
        return self.finetuned.tensor(name).to(dtype) - self.base.tensor(name).to(dtype)

    def is_zero(self) -> bool:
        """True if finetuning changed no localizable weight."""
        names = [n for n in self.names if not self.finetuned.is_known_as(self.base, n)]
        return all(not bool(chunk.any()) for name in names for chunk in self.chunks(name))

    def _dtype(self, name: str) -> torch.dtype:
        pair = {self.base.info(name).dtype, self.finetuned.info(name).dtype}
        return torch.float64 if torch.float64 in pair else torch.float32


def outside_share(base: Checkpoint, finetuned: Checkpoint, names: Sequence[str]) -> OutsideShare:
    """Measure the changes outside of the tensors `names`, over all tensors of both checkpoints.

    Args:
        base: the base's checkpoint.
        finetuned: the finetuned one under the base's names.
        names: the localizable tensors.
    """
    shared = [
        name
        for name in finetuned.floating
        if name in base
        and not finetuned.is_known_as(base, name)
        and base.info(name).dtype in FLOATING
        and base.info(name).shape == finetuned.info(name).shape
    ]
    vector = TaskVector(base, finetuned, shared)
    inside = frozenset(names)
    outside = {name: _square(vector, name) for name in vector.names if name not in inside}
    if not any(outside.values()):
        return OutsideShare(0.0, ())
    total = sum(
        outside[name] if name in outside else _square(vector, name) for name in vector.names
    )
    shares = [(name, value / total) for name, value in outside.items() if value]
    ranked = sorted(shares, key=lambda item: (-item[1], item[0]))
    return OutsideShare(sum(share for _, share in ranked), tuple(ranked))


def _square(vector: TaskVector, name: str) -> float:
    """The squared norm of a tensor's change."""
    return sum(float(np.square(c.numpy(), dtype=np.float64).sum()) for c in vector.chunks(name))


def check_finite(finetuned: Checkpoint, base: Checkpoint | None = None) -> None:
    """Raise `CannotJoin` with the names of all tensors with NaN or infinity.

    Args:
        finetuned: the checkpoint.
        base: a checkpoint that is finite, some of whose tensors it may share.
    """

    def count(name: str) -> int:
        if base is not None and finetuned.is_known_as(base, name):
            return 0
        if base is not None and _is_bounded(finetuned, base, name):
            return 0
        return _not_finite(finetuned.tensor(name).view(-1))

    with ThreadPoolExecutor(max_workers=2) as pool:
        counts = zip(finetuned.floating, pool.map(count, finetuned.floating), strict=True)
        bad = [f"{name}: {n} of {finetuned.info(name).numel}" for name, n in counts if n]
    if bad:
        raise CannotJoin(
            "the finetuned model has weights that are not finite",
            expected="finite weights",
            found=f"NaN or infinity in {len(bad)} tensors",
            hint="finetune the model again, perhaps with a smaller learning rate",
            details=bad,
        )


def _is_bounded(finetuned: Checkpoint, base: Checkpoint, name: str) -> bool:
    """True if the factors of a change show that no weight overflows; nothing is computed."""
    factors = finetuned.factors(name)
    if factors is None or name not in base:
        return False
    flat = base.tensor(name).view(-1)
    starts = range(0, flat.numel(), SERIAL)
    ends = [end for start in starts for end in flat[start : start + SERIAL].aminmax()]
    largest = float(torch.stack(ends).abs().max()) if ends else 0.0
    # Half, because sum and product are rounded.
    return largest + factors.bound() < torch.finfo(finetuned.info(name).dtype).max / 2


def _not_finite(flat: Tensor) -> int:
    bits, inf = as_integers(flat), as_integers(torch.tensor([math.inf], dtype=flat.dtype))[0]
    unsigned = bits.view(f"u{bits.itemsize}")
    negative_inf = inf.view(unsigned.dtype) | unsigned.dtype.type(1 << (8 * bits.itemsize - 1))
    count = 0
    for start in range(0, len(bits), _PIECE):
        piece = slice(start, start + _PIECE)
        # As integers, infinity and NaN are the largest of their sign.
        if bits[piece].max() >= inf or unsigned[piece].max() >= negative_inf:
            count += int(np.count_nonzero(bits[piece] & inf == inf))
    return count
