"""TIES (Yadav et al., NeurIPS 2023): trim, elect a sign per coordinate, disjoint merge.

Each task vector keeps its largest entries. The elected sign of a coordinate is that of the sum of
the kept entries, and the entries with that sign are averaged, or summed for Consensus (Wang et
al., ICML 2024). If the sum is 0, the base stays.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from restitch.merging.localize.dataless import kept_count
from restitch.merging.numerics.rounding import SERIAL
from restitch.merging.ranking.member_vector import MemberVector
from restitch.merging.ranking.quantile import Cut, kth_largest
from restitch.merging.ranking.top_k import Scores
from restitch.merging.rules.elementwise import Floats, Range, all_bits, sum_arrays, sum_vectors
from restitch.merging.rules.settings import check_choice


class Trim:
    """Sets the small entries of task vectors to 0.

    Args:
        vectors: the members' task vectors.
        density: the share of each that is kept.
        over: `model` ranks all weights together, as the paper does; `tensor` each tensor alone.
    """

    def __init__(self, vectors: Sequence[MemberVector], density: float, over: str) -> None:
        check_choice("trim", over, ("model", "tensor"))
        kept_count(density, 0)  # checks the density
        self._vectors = vectors
        self._density = density
        self._of_tensor = cache(self._cut_of_tensor)
        self._of_model = [self._cut(vector) for vector in vectors] if over == "model" else None

    def apply(self, part: Range) -> list[tuple[int, Floats]]:
        """The trimmed task vectors of a range."""
        for number, vector in part.vectors:
            whole = self._of_model
            cut = whole[number] if whole else self._of_tensor(number, part.name)
            cut.trim(part.name, part.start, vector)
        return list(part.vectors)

    def _cut_of_tensor(self, number: int, name: str) -> Cut:
        return self._cut(_TensorScores(self._vectors[number], name))

    def _cut(self, scores: Scores) -> Cut:
        coordinates = sum(scores.numel(name) for name in scores.names)
        return kth_largest(scores, kept_count(self._density, coordinates))


class _TensorScores:
    """The scores of one tensor of a task vector."""

    floor = 0.0

    def __init__(self, vector: MemberVector, name: str) -> None:
        self.names = (name,)
        self.score_dtype = vector.score_dtype
        self.numel = vector.numel
        self.chunks = vector.chunks
        self.sample = vector.sample


def disjoint_merge(vectors: Sequence[tuple[int, Floats]], *, mean: bool) -> Floats:
    """The mean, or the sum, of the task vectors that agree with the elected sign.

    Args:
        vectors: the trimmed task vectors, each with its member number; they are overwritten.
        mean: average instead of sum.
    """
    sums = sum_vectors(vectors)
    integers = np.dtype(f"i{sums.itemsize}")
    decided = all_bits(np.absolute(sums) > 0, integers)
    # After negation where the sum is negative, all that agree are positive.
    signs = sums.view(integers)
    signs &= np.iinfo(integers).min
    turned = []
    owners = np.zeros(len(sums), dtype=np.min_scalar_type(len(vectors)))
    for _, vector in vectors:
        bits = vector.view(integers)
        bits ^= signs
        for piece in torch.split(torch.from_numpy(vector), SERIAL):
            torch.relu_(piece)  # numpy's maximum with a scalar takes six times as long
        owners += (vector > 0).view(np.uint8)
        turned.append(vector)
    merged = sum_arrays(turned, reuse=True)
    if mean:
        owners |= (owners == 0).view(np.uint8)
        merged /= owners.astype(merged.dtype)
    bits = merged.view(integers)
    bits ^= signs
    bits &= decided
    return merged
