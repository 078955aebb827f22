"""TALL masks and Consensus Merging (Wang et al., ICML 2024), on ranges of task vectors.

A task's mask keeps a coordinate where its own task vector is at least `threshold` times as far
from 0 as from the multi-task vector (their Eq. 4): |tau_t| >= lambda |tau_MT - tau_t|. Consensus
keeps of the multi-task vector what at least `agreement` tasks have in their masks (Eq. 8).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from restitch.merging.rules.elementwise import Floats

THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6)


def tall_mask(vector: Floats, together: Floats, threshold: float) -> NDArray[np.bool_]:
    """The coordinates that a task needs of a multi-task vector.

    Args:
        vector: the task's own.
        together: the multi-task vector.
        threshold: the paper's lambda; a larger one keeps less.
    """
    return np.asarray(np.absolute(vector) >= threshold * np.absolute(together - vector))


def consensus_vector(
    vectors: Sequence[tuple[int, Floats]],
    together: Floats,
    thresholds: Sequence[float],
    agreement: int,
) -> Floats:
    """The multi-task vector where enough tasks have it in their masks, 0 elsewhere.

    Args:
        vectors: the task vectors as they are, each with its member's number.
        together: the multi-task vector.
        thresholds: lambda by member's number.
        agreement: how many tasks must agree (the paper's k).
    """
    votes = np.zeros(together.shape, dtype=np.int16)
    for number, vector in vectors:
        votes += tall_mask(vector, together, thresholds[number])
    return np.where(votes >= agreement, together, 0)
