"""DC-Merge (Zhang et al., CVPR 2026): tasks merged in a basis that covers the directions of all.

As in the authors' code for whole finetuned models, with these differences. The singular values of
LoRA members are not evened out. A direction that several members share to the last digit is covered
once; theirs adds an arbitrary second one. The number of entries that stay is rounded, not cut. The
number of triplets may be set (`rank`), and the result may be calibrated (`calibrate`).
"""

import math

import torch
from torch import Tensor

from restitch.merging.files.edits import Edits
from restitch.merging.methods.registry import method
from restitch.merging.rules.merge_inputs import MergeInputs
from restitch.merging.rules.per_matrix import Matrix, PerMatrix, nearest_orthogonal
from restitch.merging.rules.settings import check_range
from restitch.merging.rules.triplets import check_share, leading_triplets

# The mean of the members that agree is smaller than their sum: without calibration, the best
# coefficient of four members lies above 2.
SCALES = (0.6, 0.8, 1.0, 1.2, 1.6, 2.0, 2.4, 2.8, 3.2, 4.0, 5.0)


@method(
    name="dc-merge",
    version=2,
    source="Zhang et al., DC-Merge, CVPR 2026, arXiv 2603.06242",
    exact=False,
    whole=True,
    tunes=("alpha", SCALES),
)
def dc_merge(
    inputs: MergeInputs,
    *,
    alpha: float = 1.0,
    density: float = 0.001,
    rank: float = 1.0,
    calibrate: bool = False,
) -> Edits:
    """Base + alpha * (the members' leading triplets, merged in a common basis).

    Args:
        inputs: the base and the members, each with its whole task vector.
        alpha: the coefficient, which the paper tunes.
        density: the share of the entries of each M_t that is kept (see `merged`).
        rank: the largest share of each matrix's rank that is kept of a member; the paper keeps 1/T
            of T members, and so does the default.
        calibrate: scale each matrix so that on average the members' triplets are met in full, which
            the paper does not. Then 1 is a good `alpha` for any number of members.
    """
    check_range("alpha", alpha, 0, 100)
    check_range("density", density, 0, 1)
    check_share(rank)

    def rule(matrix: Matrix) -> Tensor:
        return alpha * merged(matrix.changes, matrix.rank, density, rank, calibrate=calibrate)

    return PerMatrix(inputs, rule)


def merged(
    changes: Tensor,
    rank: int,
    density: float = 0.001,
    share: float = 1.0,
    *,
    calibrate: bool = False,
) -> Tensor:
    """Merge the leading triplets of each matrix in the basis that is nearest to all of them.

    U and V are the nearest orthonormal vectors to all members' left and right ones. A member is
    M_t = U^T U_t S_t V_t^T V there. Of each, the largest entries are kept, and only those in the
    square blocks of k rows and columns on the diagonal, one for each member. Each entry of the
    merged M is the mean of those with the sign of their sum. The result is U M V^T.

    Args:
        changes: task vectors of one matrix, members x rows x columns.
        rank: r, the smaller side of the matrix (of the tensor itself in a core space).
        density: the share of the entries that is kept of each M_t, at least one. They are counted
            with r // T triplets of each member, for every share and in a core space, too.
        share: the share of r that is kept of a member, at most 1/T.
        calibrate: multiply the result by `answer`.
    """
    kept, members = leading_triplets(changes, rank, share), len(changes)
    left, right = nearest_orthogonal(kept.left), nearest_orthogonal(kept.right)
    side = members * max(1, rank // members)
    entries = min(max(1, math.floor(density * side * side + 0.5)), len(kept.values) ** 2)
    in_basis = (
        (left.mT @ own_left * values) @ (own_right @ right.mT)
        for own_left, values, own_right in zip(
            kept.left.chunk(members, 1),
            kept.values.chunk(members),
            kept.right.chunk(members),
            strict=True,
        )
    )
    blocks = torch.stack([diagonal_blocks(largest(one, entries), members) for one in in_basis])
    found = elected_mean(blocks)
    if calibrate:
        found = found * answer(found, blocks, kept.values)
    turned = torch.stack(left.chunk(members, 1)) @ found
    return torch.cat(tuple(turned), 1) @ right


def largest(matrix: Tensor, count: int) -> Tensor:
    """The matrix with its `count` largest entries, those as large as the last of them, and 0.

    Entries that are 0 up to rounding do not stay: they would count as members that agree.
    """
    sizes = matrix.abs()
    top = sizes.reshape(-1).topk(count).values
    least = torch.maximum(top[-1], top[0] * len(matrix) * torch.finfo(matrix.dtype).eps)
    return matrix * (sizes >= least)


def diagonal_blocks(matrix: Tensor, count: int) -> Tensor:
    """The square blocks on the diagonal, count x side x side."""
    side = len(matrix) // count
    blocks = matrix.view(count, side, count, side)
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)


def elected_mean(members: Tensor) -> Tensor:
    """The mean over the first dimension of the numbers with the sign of the sum; 0 without one."""
    sign = members.sum(0).sign()
    agrees = (members.sign() == sign) & (sign != 0)
    return (members * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def answer(found: Tensor, blocks: Tensor, values: Tensor) -> Tensor:
    """The factor with which the members meet themselves in the merged matrix on average.

    sum |S_t|^2 / sum <M, M_t>: after it, the projection of M on the members is theirs in total.

    Args:
        found: M by its blocks.
        blocks: the entries that stay of each M_t, members x blocks.
        values: the singular values of all members.
    """
    met = (found * blocks.sum(0)).sum()
    return values.square().sum() / met.clamp_min(torch.finfo().tiny)
