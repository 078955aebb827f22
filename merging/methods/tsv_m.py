"""TSV-Merge (Gargiulo et al., CVPR 2025): each task's leading singular vectors, made orthogonal."""

import torch
from torch import Tensor

from restitch.merging.files.edits import Edits
from restitch.merging.methods.registry import method
from restitch.merging.rules.merge_inputs import MergeInputs
from restitch.merging.rules.per_matrix import PerMatrix, nearest_orthogonal, svd
from restitch.merging.rules.settings import check_range


@method(
    name="tsv-m",
    version=1,
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
    return PerMatrix(inputs, lambda matrix: alpha * merged(matrix.changes))


def merged(changes: Tensor) -> Tensor:
    """Merge the leading r/T triplets of each matrix, with left and right vectors orthogonalized.

    Args:
        changes: task vectors of one matrix, members x rows x columns.
    """
    kept = max(1, min(changes.shape[1:]) // len(changes))
    left, values, right = svd(changes)
    lefts = nearest_orthogonal(torch.cat([one[:, :kept] for one in left], dim=1))
    rights = nearest_orthogonal(torch.cat([one[:kept] for one in right], dim=0))
    return (lefts * values[:, :kept].reshape(-1)) @ rights
