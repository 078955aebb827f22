"""TSV-Merge (Gargiulo et al., CVPR 2025): each task's leading singular vectors, made orthogonal."""

import torch
from torch import Tensor

from restitch.merging.files.edits import Edits
from restitch.merging.methods.registry import method
from restitch.merging.numerics.factors import above_rounding
from restitch.merging.rules.merge_inputs import MergeInputs
from restitch.merging.rules.per_matrix import PerMatrix, nearest_orthogonal, svd
from restitch.merging.rules.settings import LARGE_COEFFICIENTS, check_range


@method(
    name="tsv-m",
    version=2,
    source="Gargiulo et al., Task singular vectors, CVPR 2025, arXiv 2412.00081",
    exact=False,
    whole=True,
    tunes=("alpha", LARGE_COEFFICIENTS),
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

    Vectors of the singular value 0 are arbitrary, and would bend the others: they are left out.

    Args:
        changes: task vectors of one matrix, members x rows x columns.
        rank: r, the smaller side of the matrix (of the tensor itself in a core space).
    """
    kept = max(1, rank // len(changes))
    left, values, right = svd(changes)
    values = values * above_rounding(values, max(changes.shape[1:]))
    real = values[:, :kept] > 0
    lefts = torch.cat([one[:, :kept] * own for one, own in zip(left, real, strict=True)], dim=1)
    rights = torch.cat([one[:kept] * own[:, None] for one, own in zip(right, real, strict=True)])
    spectrum = values[:, :kept].reshape(-1)
    return (nearest_orthogonal(lefts) * spectrum) @ nearest_orthogonal(rights)
