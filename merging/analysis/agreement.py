"""The number of weights in exactly 0, 1, ... masks (Wang et al., ICML 2024, Eq. 7).

The masks are TALL masks on a multi-task vector, or those of the members' deltas. The paper calls
weights in no mask catastrophic, in one selfish, in two or more general, and in all universal.
Streamed over the tensors; a weight that no delta keeps is in no mask.
"""

from collections.abc import Iterable

import numpy as np

from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.rules.consensus import MultiTask, count_votes
from restitch.merging.rules.elementwise import ranges
from restitch.merging.rules.merge_inputs import MergeInputs
from restitch.merging.rules.stitch import DeltaMember, sparse_delta

# Raised when the counts of the same members change.
VERSION = 1


def agreement_profile(
    base: Checkpoint,
    members: Iterable[DeltaMember],
    names: Iterable[str],
    multi_task: MultiTask,
    threshold: float,
) -> tuple[int, ...]:
    """Count the weights in exactly 0, 1, ... TALL masks, up to all members.

    Args:
        base: the base's checkpoint.
        members: the members, each with its whole task vector.
        names: the tensors to count.
        multi_task: makes the multi-task vector.
        threshold: lambda of the masks.
    """
    vectors = MergeInputs(base, members).vectors
    merged = multi_task(vectors)
    counts = np.zeros(len(vectors) + 1, dtype=np.int64)
    for name in names:
        if not any(name in vector for vector in vectors):
            counts[0] += base.info(name).numel
            continue
        for part in ranges(base, vectors, name):
            votes = count_votes(part, merged(part), threshold)
            counts += np.bincount(votes, minlength=len(counts))
    return tuple(counts.tolist())


def kept_profile(
    base: Checkpoint, members: Iterable[DeltaMember], names: Iterable[str]
) -> tuple[int, ...]:
    """Count the weights in exactly 0, 1, ... masks of the members' deltas."""
    deltas = [sparse_delta(member) for member in members]
    counts = np.zeros(len(deltas) + 1, dtype=np.int64)
    for name in names:
        votes = np.zeros(base.info(name).numel, dtype=np.int64)
        for delta in deltas:
            if name in delta:
                votes[delta.coordinates(name).numpy()] += 1
        counts += np.bincount(votes, minlength=len(counts))
    return tuple(counts.tolist())
