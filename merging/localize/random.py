"""Random coordinates, the baseline of all localizers; the masks of one seed are nested."""

import torch

from restitch.merging.ranking.task_vector import TaskVector
from restitch.merging.ranking.top_k import TensorScores

NAME = "random"
VERSION = 1


def random_scores(vector: TaskVector, seed: int) -> TensorScores:
    """A random score for every coordinate.

    Args:
        vector: the task vector whose coordinates are ranked; its values do not matter.
        seed: the seed of the ranking.
    """
    draw = torch.Generator().manual_seed(seed)
    return TensorScores(
        {name: torch.rand(vector.numel(name), generator=draw) for name in vector.names}
    )
