"""Iso-CTS (Marczak et al., ICML 2025): an even spectrum, common and task-specific directions."""

import torch
from torch import Tensor

from restitch.merging.files.edits import Edits
from restitch.merging.methods.iso_c import SCALES, mean_of
from restitch.merging.methods.registry import method
from restitch.merging.numerics.decompositions import svd
from restitch.merging.numerics.factors import above_rounding
from restitch.merging.rules.merge_inputs import MergeInputs
from restitch.merging.rules.per_matrix import PerMatrix, nearest_orthogonal
from restitch.merging.rules.settings import check_range


@method(
    name="iso-cts",
    version=2,
    source="Marczak et al., No task left behind: isotropic merging, ICML 2025, arXiv 2502.04959",
    exact=False,
    whole=True,
    tunes=("alpha", SCALES),
)
def iso_cts(inputs: MergeInputs, *, alpha: float = 1.3, common: float = 0.8) -> Edits:
    """Base + alpha * (mean singular value * common and task-specific directions, orthogonal).

    Args:
        inputs: the base and the members, each with its whole task vector.
        alpha: the coefficient, which the paper tunes.
        common: the share of directions from the sum; the others are from the members.
    """
    check_range("alpha", alpha, 0, 100)
    check_range("common", common, 0, 1)
    return PerMatrix(inputs, lambda matrix: alpha * merged(matrix.changes, common))


def merged(changes: Tensor, common: float) -> Tensor:
    """Merge the leading k directions of the sum and s of each member's residual.

    With the rank r, s = round((r - floor(common * r)) / T) and k = r - T * s, as in the authors'
    code. The residual of D_t is D_t - U_k U_k^T D_t, where U_k are the leading left vectors of the
    sum. All left and all right vectors are replaced by the nearest orthonormal ones, and all
    singular values by their mean. Directions whose singular value is 0 up to rounding do not count.

    Args:
        changes: task vectors of one matrix, members x rows x columns.
        common: see `iso_cts`.
    """
    rank, members = min(changes.shape[1:]), len(changes)
    own = min(round((rank - int(common * rank)) / members), rank // members)
    shared = rank - members * own
    left, values, right = svd(changes.sum(0))
    lefts, spectrum, rights = [left[:, :shared]], [values[:shared]], [right[:shared]]
    rest = changes - lefts[0] @ (lefts[0].mT @ changes)
    of_members = zip(*svd(rest), strict=True)
    for one_left, one_values, one_right in of_members:
        lefts.append(one_left[:, :own])
        spectrum.append(one_values[:own])
        rights.append(one_right[:own])
    together = torch.cat(spectrum)
    real = above_rounding(together, max(changes.shape[1:]))
    left = nearest_orthogonal(torch.cat(lefts, 1) * real)
    right = nearest_orthogonal(torch.cat(rights) * real[:, None])
    return mean_of(together, real) * left @ right
