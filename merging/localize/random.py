"""Coordinates by lot, which any localizer must beat: seeded, and nested for one seed."""

import torch

from restitch.merging.ranking.task_vector import TaskVector
from restitch.merging.ranking.top_k import TensorScores

NAME = "random"
VERSION = 1


def random_scores(vector: TaskVector, seed: int) -> TensorScores:
    """A score for every coordinate, drawn tensor by tensor.

    Args:
        vector: whose coordinates are ranked; its values do not matter.
        seed: other seeds rank otherwise.
    """
    draw = torch.Generator().manual_seed(seed)
    return TensorScores(
        {name: torch.rand(vector.numel(name), generator=draw) for name in vector.names}
    )
