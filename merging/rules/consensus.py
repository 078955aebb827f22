"""TALL masks and Consensus Merging (Wang et al., ICML 2024), on ranges of task vectors.

A task's mask keeps the coordinates where |tau_t| >= lambda |tau_MT - tau_t| (their Eq. 4), with
its own task vector tau_t and the multi-task vector tau_MT. Consensus keeps the coordinates of the
multi-task vector that are in the masks of at least `agreement` tasks (Eq. 8).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from restitch.merging.rules.elementwise import Floats

THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6)


def tall_mask(vector: Floats, together: Floats, threshold: float) -> NDArray[np.bool_]:
    """The TALL mask of a task: true where it needs the multi-task vector.

    Args:
        vector: the task's own task vector.
        together: the multi-task vector.
        threshold: the paper's lambda; a larger one keeps less.
    """
    return np.asarray(np.absolute(vector) >= threshold * np.absolute(together - vector))


def consensus_vector(
    vectors: Sequence[tuple[int, Floats]],
    together: Floats,
    threshold: float,
    agreement: int,
) -> Floats:
    """The multi-task vector where enough tasks have the coordinate in their masks, 0 elsewhere.

    Args:
        vectors: the original task vectors, each with its member number.
        together: the multi-task vector.
        threshold: lambda of all masks.
        agreement: the number of tasks that must agree (the paper's k).
    """
    votes = np.zeros(together.shape, dtype=np.int16)
    for _, vector in vectors:
        votes += tall_mask(vector, together, threshold)
    return np.where(votes >= agreement, together, 0)
