"""TALL masks and Consensus Merging (Wang et al., ICML 2024), on ranges of task vectors.

A task's mask keeps the coordinates where |tau_t| >= lambda |tau_MT - tau_t| (their Eq. 4), with
its own task vector tau_t and the multi-task vector tau_MT. Consensus keeps the coordinates of the
multi-task vector that are in the masks of at least `agreement` tasks (Eq. 8).
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from restitch.merging.files.edits import Edits
from restitch.merging.ranking.member_vector import MemberVector
from restitch.merging.rules.elementwise import Elementwise, Floats, Range, sum_vectors
from restitch.merging.rules.merge_inputs import MergeInputs
from restitch.merging.rules.settings import check_range
from restitch.merging.rules.ties import Trim, disjoint_merge

THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6)

# Computes the multi-task vector on a range, without overwriting the task vectors.
MultiTaskVector = Callable[[Range], Floats]
# Makes the above from the members' task vectors.
MultiTask = Callable[[Sequence[MemberVector]], MultiTaskVector]


def task_arithmetic_sum(_: Sequence[MemberVector]) -> MultiTaskVector:
    """The multi-task vector of task arithmetic."""
    return lambda part: sum_vectors(part.vectors)


def ties_sum(
    vectors: Sequence[MemberVector], density: float = 0.2, trim: str = "model"
) -> MultiTaskVector:
    """The multi-task vector of TIES, summed instead of averaged."""
    kept = Trim(vectors, density, trim)

    def merged(part: Range) -> Floats:
        copies = [(number, vector.copy()) for number, vector in part.vectors]
        return disjoint_merge(kept.apply(Range(part.name, part.start, copies)), mean=False)

    return merged


def tall_mask(vector: Floats, together: Floats, threshold: float) -> NDArray[np.bool_]:
    """The TALL mask of a task: true where it needs the multi-task vector.

    Args:
        vector: the task's own task vector.
        together: the multi-task vector.
        threshold: the paper's lambda; a larger one keeps less.
    """
    return np.asarray(np.absolute(vector) >= threshold * np.absolute(together - vector))


def count_votes(part: Range, together: Floats, threshold: float) -> NDArray[np.int16]:
    """The number of tasks that have each coordinate in their TALL masks."""
    votes = np.zeros(together.shape, dtype=np.int16)
    for _, vector in part.vectors:
        votes += tall_mask(vector, together, threshold)
    return votes


def consensus(
    inputs: MergeInputs, multi_task: MultiTask, alpha: float, threshold: float, agreement: int
) -> Edits:
    """Base + alpha * (the multi-task vector where enough tasks have the coordinate in their masks).

    Args:
        inputs: the base and the members, each with its whole task vector.
        multi_task: makes the multi-task vector.
        alpha: the coefficient.
        threshold: lambda of all masks.
        agreement: the number of tasks that must agree (the paper's k); at most all members.
    """
    check_range("alpha", alpha, 0, 10)
    check_range("threshold", threshold, 0, 10)
    check_range("agreement", agreement, 1, 1 << 15)
    together, needed = multi_task(inputs.vectors), min(agreement, len(inputs.vectors))

    def merged(part: Range) -> Floats:
        whole = together(part)
        return alpha * np.where(count_votes(part, whole, threshold) >= needed, whole, 0)

    return Elementwise(inputs.base, inputs.vectors, merged)
