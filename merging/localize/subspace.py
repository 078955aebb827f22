"""Localization by subspace: keep the leading singular triplets of each matrix's task vector.

The task vector of a matrix is U S V^T. Of its rank r, the k = round(share * r) largest singular
values stay, at least one, as the factors U sqrt(S) and sqrt(S) V^T. Tensors that are no matrices
keep their whole task vector. It needs no data. Large matrices are decomposed by subspace iteration
on random vectors with a fixed seed (Halko, Martinsson and Tropp, 2011, algorithm 4.4), so the
result is numeric: its bytes depend on the machine.
"""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from restitch.merging.files.factor_file import FactorFile, FactorTensor
from restitch.merging.localize.dataless import kept_count
from restitch.merging.numerics.decompositions import orthonormal, svd
from restitch.merging.numerics.factors import Factors, above_rounding
from restitch.merging.progress import Progress
from restitch.merging.ranking.task_vector import TaskVector

NAME = "subspace"
VERSION = 1

# By the word for the stored values: the types of factors and of whole task vectors.
STORED = {
    "int8": (torch.int8, torch.bfloat16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "exact": (torch.float32, torch.float32),
}

# A whole decomposition is fast enough below.
_LARGE = 512
_MORE, _ITERATIONS, _SEED = 16, 4, 0


def localize_subspace(
    vector: TaskVector,
    share: float,
    values: str,
    *,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Iterator[FactorTensor]:
    """The leading triplets of every changed tensor, one tensor in memory at a time.

    Where the finetuned model is an adapter with factors of its own, they stay as they are.

    Args:
        vector: the task vector of the finetuned model.
        share: the share of each matrix's rank.
        values: a key of `STORED`.
        device: computes the decompositions.
        progress: called with the coordinates done and the total.
    """
    factors_dtype, whole_dtype = STORED[values]
    done = 0
    for name in vector.names:
        shape = vector.base.info(name).shape
        own = vector.finetuned.factors(name)
        if own is not None:
            yield FactorTensor(name, shape, own, own.dtype)
            done += vector.numel(name)
            continue
        change = vector.difference(name).float()
        if bool(change.any()):
            kept: Factors | Tensor = change
            if is_matrix(shape):
                matrix = change.reshape(shape[0], -1)
                rank = kept_rank(share, *matrix.shape)
                kept = leading(matrix.to(device or matrix.device), rank)
            dtype = factors_dtype if isinstance(kept, Factors) else whole_dtype
            yield FactorTensor(name, shape, kept, dtype)
        done += change.numel()
        if progress is not None:
            progress(done, vector.coordinates)


def own_factors(vector: TaskVector) -> Iterator[FactorTensor]:
    """The exact task vector of an adapter: its own factors, and other changes as a whole."""
    base, finetuned = vector.base, vector.finetuned
    for name in vector.names:
        if finetuned.is_known_as(base, name):
            continue
        shape, own = base.info(name).shape, finetuned.factors(name)
        if own is not None:
            yield FactorTensor(name, shape, own, own.dtype)
            continue
        # Twice the digits of the weights, so that the sum is the finetuned weight again.
        wide = torch.float32 if base.info(name).dtype.itemsize == 2 else torch.float64
        change = finetuned.tensor(name).to(wide) - base.tensor(name).to(wide)
        if bool(change.any()):
            yield FactorTensor(name, shape, change, wide)


def cut(
    triplets: FactorFile, own: Collection[str], share: float, values: str
) -> Iterator[FactorTensor]:
    """The first triplets of a file that has more of them, stored in another way.

    Args:
        triplets: written in the values `exact`.
        own: the tensors with factors of the model's own, which stay as they are.
        share: the share of each matrix's rank.
        values: a key of `STORED`.
    """
    factors_dtype, whole_dtype = STORED[values]
    for name in triplets.names:
        shape, factors = triplets.info(name).shape, triplets.low_rank(name)
        if factors is None:
            yield FactorTensor(name, shape, triplets.difference(name), whole_dtype)
        elif name in own:
            yield FactorTensor(name, shape, factors, factors.dtype)
        else:
            rank = kept_rank(share, factors.left.shape[0], factors.right.shape[1])
            first = Factors(factors.left[:, :rank], factors.right[:rank], factors.scale)
            yield FactorTensor(name, shape, first, factors_dtype)


def is_matrix(shape: tuple[int, ...]) -> bool:
    """True if a tensor of this shape has factors: at least two rows and two columns."""
    return len(shape) > 1 and shape[0] > 1 and torch.Size(shape[1:]).numel() > 1


def kept_rank(share: float, rows: int, columns: int) -> int:
    """The number of triplets that a share of a matrix's rank keeps: at least one."""
    return max(1, kept_count(share, min(rows, columns)))


def leading(matrix: Tensor, rank: int) -> Factors:
    """The factors of the leading triplets, without those that are zero up to rounding.

    Args:
        matrix: rows x columns, float32, on any device.
        rank: at most the smaller side.
    """
    left, values, right = _leading_triplets(matrix, rank)
    count = max(1, int(above_rounding(values, max(matrix.shape)).sum()))
    roots = values[:count].sqrt()
    return Factors((left[:, :count] * roots).cpu(), (roots[:, None] * right[:count]).cpu())


def _leading_triplets(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    size = rank + _MORE
    if min(matrix.shape) < _LARGE or 4 * size > min(matrix.shape):
        left, values, right = svd(matrix)
        return left[:, :rank], values[:rank], right[:rank]
    generator = torch.Generator().manual_seed(_SEED)
    probe = torch.randn(matrix.shape[1], size, generator=generator).to(matrix)
    basis = orthonormal(matrix @ probe)
    for _ in range(_ITERATIONS):
        basis = orthonormal(matrix.mT @ basis)
        basis = orthonormal(matrix @ basis)
    small, values, right = svd(basis.mT @ matrix)
    return (basis @ small)[:, :rank], values[:rank], right[:rank]
