"""TSV-Merge (Gargiulo et al., CVPR 2025): each task's leading singular vectors, made orthogonal."""

from torch import Tensor

from restitch.merging.files.edits import Edits
from restitch.merging.methods.registry import method
from restitch.merging.rules.merge_inputs import MergeInputs
from restitch.merging.rules.per_matrix import PerMatrix, nearest_orthogonal
from restitch.merging.rules.settings import LARGE_COEFFICIENTS, check_range
from restitch.merging.rules.triplets import check_share, leading_triplets


@method(
    name="tsv-m",
    version=3,
    source="Gargiulo et al., Task singular vectors, CVPR 2025, arXiv 2412.00081",
    exact=False,
    whole=True,
    tunes=("alpha", LARGE_COEFFICIENTS),
    added=("rank",),
)
def tsv_m(inputs: MergeInputs, *, alpha: float = 1.0, rank: float = 1.0) -> Edits:
    """Base + alpha * (sum over tasks of decorrelated leading singular triplets).

    Args:
        inputs: the base and the members, each with its whole task vector.
        alpha: the coefficient; the paper uses 1.
        rank: the largest share of each matrix's rank that is kept of a member; the paper keeps 1/T
            of T members, and so does the default.
    """
    check_range("alpha", alpha, 0, 10)
    check_share(rank)
    return PerMatrix(inputs, lambda matrix: alpha * merged(matrix.changes, matrix.rank, rank))


def merged(changes: Tensor, rank: int, share: float = 1.0) -> Tensor:
    """Merge the leading triplets of each matrix, with left and right vectors orthogonalized.

    A triplet that several members share counts once, with the mean of its singular values.

    Args:
        changes: task vectors of one matrix, members x rows x columns.
        rank: r, the smaller side of the matrix (of the tensor itself in a core space).
        share: the share of r that is kept of a member, at most 1/T.
    """
    kept = leading_triplets(changes, rank, share)
    return (nearest_orthogonal(kept.left) * kept.values) @ nearest_orthogonal(kept.right)
