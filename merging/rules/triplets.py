"""The leading singular triplets of the members' task vectors of one matrix."""

from dataclasses import dataclass

import torch
from torch import Tensor

from restitch.merging.localize.subspace import kept_rank
from restitch.merging.numerics.decompositions import svd
from restitch.merging.numerics.factors import above_rounding
from restitch.merging.rules.settings import bad_setting


@dataclass(frozen=True)
class Triplets:
    """Leading triplets, as many of each member, one member after the other.

    Vectors of the singular value 0 are arbitrary, and would bend the others: they are 0 here.

    Attributes:
        left: rows x triplets.
        values: the singular values.
        right: triplets x columns.
    """

    left: Tensor
    values: Tensor
    right: Tensor


def leading_triplets(changes: Tensor, rank: int, share: float) -> Triplets:
    """The leading k triplets of each of T members: k = share * r, at most r // T, at least 1.

    Args:
        changes: task vectors of one matrix, members x rows x columns.
        rank: r, the smaller side of the matrix (of the tensor itself in a core space).
        share: more than 0, at most 1.
    """
    kept = max(1, min(rank // len(changes), kept_rank(share, rank, rank)))
    left, values, right = svd(changes)
    values = values * above_rounding(values, max(changes.shape[1:]))
    real = values[:, :kept] > 0
    return Triplets(
        torch.cat([one[:, :kept] * own for one, own in zip(left, real, strict=True)], dim=1),
        values[:, :kept].reshape(-1),
        torch.cat([one[:kept] * own[:, None] for one, own in zip(right, real, strict=True)]),
    )


def check_share(share: float) -> None:
    """Raise `BadInput` if the setting `rank` is not a share of a matrix's rank."""
    if not 0 < share <= 1:
        raise bad_setting("rank", "out of range", "a number above 0, at most 1", share)
