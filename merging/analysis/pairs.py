"""Signals on how well two members fit together, from their deltas alone, and how they correlate.

- `shared`: the Jaccard index of the coordinates that the members change;
- `sign conflict`: the share of the common coordinates that they change in opposite directions;
- `cosine`: of the task vectors;
- `subspace overlap`: the mean squared cosine of the principal angles between the leading singular
  subspaces of their changes, over both sides of all matrices that both change.

Memory holds the task vectors of one tensor of every member.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from restitch.merging.analysis.subspaces import Bases, orthonormal_bases, squared_cosines
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.delta import Delta
from restitch.merging.localize.subspace import is_matrix, kept_rank, leading
from restitch.merging.order import by_bytes
from restitch.merging.progress import Progress, ignore
from restitch.merging.ranking.member_vector import MemberVector
from restitch.merging.rules.merge_inputs import member_vector
from restitch.merging.rules.stitch import check_fit

VERSION = 1

# Of each matrix's rank, for changes that are not kept as factors.
_SHARE = 0.0417
_DIGITS = 6
# All orders of as many values are tried; more values are ordered at random.
_MOST_EXACT, _ORDERS = 7, 9999


@dataclass(frozen=True)
class PairSignals:
    """The signals of one pair; None if the pair has no such thing in common."""

    shared: float | None
    sign_conflict: float | None
    cosine: float | None
    subspace_overlap: float | None


def pair_signals(
    base: Checkpoint, deltas: Mapping[str, Delta], progress: Progress = ignore
) -> dict[tuple[str, str], PairSignals]:
    """The signals of all pairs of members.

    Args:
        base: the base of the deltas.
        deltas: by task.
        progress: called with the elements done and the total.

    Raises:
        BadInput: a delta has a tensor that the base does not have in the same shape.
    """
    for task, delta in deltas.items():
        check_fit(base, task, delta)
    vectors = {task: member_vector(base, delta) for task, delta in deltas.items()}
    names = sorted({name for vector in vectors.values() for name in vector.names}, key=by_bytes)
    total, done = sum(base.info(name).numel for name in names), 0
    sums = {pair: _Sums() for pair in combinations(deltas, 2)}
    for name in names:
        changes = {t: v.difference(name).double() for t, v in vectors.items() if name in v}
        bases = {task: _subspace(vectors[task], name, changes[task]) for task in changes}
        for (one, other), each in sums.items():
            each.add(changes.get(one), changes.get(other), bases.get(one), bases.get(other))
        done += base.info(name).numel
        progress(done, total)
    return {pair: each.signals() for pair, each in sums.items()}


def _subspace(vector: MemberVector, name: str, change: Tensor) -> Bases | None:
    """Bases of the leading singular subspaces of a change; None if it is zero or no matrix."""
    factors = vector.low_rank(name)
    if factors is None:
        if not is_matrix(tuple(change.shape)) or not bool(change.any()):
            return None
        matrix = change.reshape(change.shape[0], -1).float()
        factors = leading(matrix, kept_rank(_SHARE, *matrix.shape))
    return orthonormal_bases(factors)


class _Sums:
    """Sums over all tensors of a pair."""

    def __init__(self) -> None:
        self.both = self.either = self.opposite = self.angles = 0
        self.dot = self.first = self.second = self.met = 0.0

    def add(
        self,
        one: Tensor | None,
        other: Tensor | None,
        bases: Bases | None,
        other_bases: Bases | None,
    ) -> None:
        """Add a tensor; None stands for no change."""
        squares = [0.0 if c is None else float(c.square().sum()) for c in (one, other)]
        self.first, self.second = self.first + squares[0], self.second + squares[1]
        if one is None or other is None:
            alone = one if other is None else other
            self.either += 0 if alone is None else int(torch.count_nonzero(alone))
            return
        product = one * other
        changed = (one != 0) & (other != 0)
        self.both += int(changed.sum())
        self.either += int(((one != 0) | (other != 0)).sum())
        self.opposite += int((changed & (torch.sign(one) != torch.sign(other))).sum())
        self.dot += float(product.sum())
        if bases is not None and other_bases is not None:
            met, angles = squared_cosines(bases, other_bases)
            self.met, self.angles = self.met + met, self.angles + angles

    def signals(self) -> PairSignals:
        """The quotients."""
        return PairSignals(
            shared=_quotient(self.both, self.either),
            sign_conflict=_quotient(self.opposite, self.both),
            cosine=_quotient(self.dot, (self.first * self.second) ** 0.5),
            subspace_overlap=_quotient(self.met, self.angles),
        )


def _quotient(above: float, below: float) -> float | None:
    """Rounded, so that pairs that differ by less have the same rank."""
    return round(above / below, _DIGITS) if below else None


def rank_correlation(
    one: Sequence[float], other: Sequence[float]
) -> tuple[float, float] | tuple[None, None]:
    """Spearman's rank correlation, and the share of orders that give at least as large a one.

    None for fewer than three values, or if all values of one side are equal.
    """
    first, second = (_centred_ranks(side) for side in (one, other))
    length = float(np.sqrt((first @ first) * (second @ second)))
    if len(first) < 3 or length == 0:
        return None, None
    seen = float(first @ second) / length
    orders = _orders(len(first))
    reached = np.abs(first @ second[orders].T) / length >= abs(seen) - 1e-9
    return seen, float(reached.mean())


def _centred_ranks(values: Sequence[float]) -> NDArray[np.float64]:
    """Ranks around zero; equal values share the mean of their ranks."""
    array = np.asarray(values, dtype=np.float64)
    ranks = np.array([(array < v).sum() + ((array == v).sum() - 1) / 2 for v in array])
    return ranks - ranks.mean() if len(ranks) else ranks


def _orders(count: int) -> NDArray[np.int64]:
    if count <= _MOST_EXACT:
        return np.array(list(permutations(range(count))))
    random = np.random.default_rng(0)
    drawn = [random.permutation(count) for _ in range(_ORDERS)]
    return np.array([np.arange(count), *drawn])
