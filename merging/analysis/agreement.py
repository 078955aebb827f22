"""The number of weights in exactly 0, 1, ... masks (Wang et al., ICML 2024, Eq. 7).

The masks are TALL masks on a multi-task vector, or those of the members' deltas. The paper calls
weights in no mask catastrophic, in one selfish, in two or more general, and in all universal.
Streamed over the tensors; a weight that no delta keeps is in no mask.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.numerics.rounding import cast
from restitch.merging.ranking.kept_vector import BLOCK, KeptVector, working_dtype
from restitch.merging.rules.consensus import tall_mask
from restitch.merging.rules.elementwise import Floats, Range, kept_vectors, sum_vectors
from restitch.merging.rules.stitch import DeltaMember
from restitch.merging.rules.ties import Trim, disjoint_merge

# Raised when the counts of the same members change.
VERSION = 1

MultiTaskVector = Callable[[Range], Floats]


def task_arithmetic_sum(_: Sequence[KeptVector]) -> MultiTaskVector:
    """The multi-task vector of task arithmetic."""
    return lambda part: sum_vectors(part.vectors)


def ties_sum(vectors: Sequence[KeptVector], density: float = 0.2) -> MultiTaskVector:
    """The multi-task vector of TIES, summed instead of averaged as in Consensus TIES."""
    trim = Trim(vectors, density, "model")
    return lambda part: disjoint_merge(trim.apply(part), mean=False)


def agreement_profile(
    base: Checkpoint,
    members: Iterable[DeltaMember],
    names: Iterable[str],
    multi_task_vector: Callable[[Sequence[KeptVector]], MultiTaskVector],
    threshold: float,
) -> tuple[int, ...]:
    """Count the weights in exactly 0, 1, ... TALL masks, up to all members.

    Args:
        base: the base's checkpoint.
        members: the members, each with its whole task vector.
        names: the tensors to count.
        multi_task_vector: makes the multi-task vector of the task vectors.
        threshold: lambda of the masks.
    """
    vectors = kept_vectors(base, members)
    merged = multi_task_vector(vectors)
    counts = np.zeros(len(vectors) + 1, dtype=np.int64)
    for name in names:
        readers = [(i, v.reader(name)) for i, v in enumerate(vectors) if name in v]
        start = 0
        for piece in torch.split(base.tensor(name).view(-1), BLOCK):
            before = cast(piece, working_dtype(piece.dtype)).numpy()
            taken = [(number, reader.read(before)) for number, reader in readers]
            votes = np.zeros(piece.numel(), dtype=np.int64)
            if taken:
                own = [(number, vector.copy()) for number, vector in taken]
                whole = merged(Range(name, start, taken))
                for _, vector in own:
                    votes += tall_mask(vector, whole, threshold)
            counts += np.bincount(votes, minlength=len(counts))
            start += piece.numel()
    return tuple(counts.tolist())


def kept_profile(
    base: Checkpoint, members: Iterable[DeltaMember], names: Iterable[str]
) -> tuple[int, ...]:
    """Count the weights in exactly 0, 1, ... masks of the members' deltas."""
    deltas = [member.delta for member in members]
    counts = np.zeros(len(deltas) + 1, dtype=np.int64)
    for name in names:
        votes = np.zeros(base.info(name).numel, dtype=np.int64)
        for delta in deltas:
            if name in delta:
                votes[delta.coordinates(name).numpy()] += 1
        counts += np.bincount(votes, minlength=len(counts))
    return tuple(counts.tolist())
