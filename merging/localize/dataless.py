"""Localization without data: the largest weights of the task vector.

Keeps exactly floor(density * coordinates + 0.5) coordinates, those with the largest
|task vector| over all localizable tensors together, ties to the lower coordinate. The
mask is the same on every machine.
"""

import math
from fractions import Fraction
from pathlib import Path

from restitch.merging.errors import BadInput
from restitch.merging.files.mask import Mask
from restitch.merging.progress import Progress
from restitch.merging.ranking.task_vector import TaskVector
from restitch.merging.ranking.top_k import top_k

NAME = "dataless"
VERSION = 1


def kept_count(density: float, coordinates: int) -> int:
    """How many of `coordinates` a density keeps: floor(density * coordinates + 0.5)."""
    if not 0 <= density <= 1:
        raise BadInput(
            "the density cannot be used",
            expected="a fraction from 0 to 1",
            found=density,
            hint="correct localize: density",
        )
    # In rationals, from the decimal that was written: 0.15 of 10 is 1.5 and rounds up.
    return math.floor(Fraction(repr(float(density))) * coordinates + Fraction(1, 2))


def localize_dataless(
    task_vector: TaskVector,
    density: float,
    *,
    scratch: Path | None = None,
    progress: Progress | None = None,
) -> Mask:
    """The mask of the largest |task vector|.

    Args:
        task_vector: what finetuning changed.
        density: the fraction of all localizable coordinates to keep.
        scratch: folder for temporary files.
        progress: called with the coordinates seen and the coordinates in all.
    """
    kept = kept_count(density, task_vector.coordinates)
    return top_k(task_vector, kept, scratch=scratch, progress=progress)
