"""TSV-Merge (Gargiulo et al., CVPR 2025): each task's leading singular vectors, made orthogonal."""

import torch
from torch import Tensor

from restitch.merging.files.edits import Edits
from restitch.merging.methods.registry import method
from restitch.merging.numerics.factors import numerical_rank
from restitch.merging.rules.merge_inputs import MergeInputs
from restitch.merging.rules.per_matrix import PerMatrix, nearest_orthogonal, svd
from restitch.merging.rules.settings import check_range


@method(
    name="tsv-m",
    version=2,
    source="Gargiulo et al., Task singular vectors, CVPR 2025, arXiv 2412.00081",
    exact=False,
    whole=True,
    tunes=("alpha", tuple(n / 5 for n in range(1, 11))),
)
def tsv_m(inputs: MergeInputs, *, alpha: float = 1.0) -> Edits:
    """Base + alpha * (sum over tasks of decorrelated leading singular triplets).

    Args:
        inputs: the base and the members, each with its whole task vector.
        alpha: the coefficient; the paper uses 1.
    """
    check_range("alpha", alpha, 0, 10)
    return PerMatrix(inputs, lambda matrix: alpha * merged(matrix.changes, matrix.rank))


def merged(changes: Tensor, rank: int) -> Tensor:
    """Merge the leading r/T triplets of each matrix, with left and right vectors orthogonalized.

    A member of a lower rank has fewer: vectors of the singular value 0 are arbitrary, and would
    bend those of the others.

    Args:
        changes: task vectors of one matrix, members x rows x columns.
        rank: r, the smaller side of the matrix (of the tensor itself in a core space).
    """
    most = max(1, rank // len(changes))
    lefts, spectrum, rights = [], [], []
    for left, values, right in zip(*svd(changes), strict=True):
        own = min(most, numerical_rank(values, max(changes.shape[1:])))
        lefts.append(left[:, :own])
        spectrum.append(values[:own])
        rights.append(right[:own])
    if not torch.cat(spectrum).numel():
        return torch.zeros_like(changes[0])
    return (nearest_orthogonal(torch.cat(lefts, 1)) * torch.cat(spectrum)) @ nearest_orthogonal(
        torch.cat(rights)
    )
