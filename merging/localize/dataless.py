"""Localization without data: keep the largest entries of the task vector.

Keeps exactly floor(density * coordinates + 0.5) coordinates with the largest |task vector|
over all localizable tensors together, with ties to the lower coordinate. The mask is the
same on every machine.
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
    """The number of coordinates that a density keeps: floor(density * coordinates + 0.5)."""
    if not 0 <= density <= 1:
        raise BadInput(
            "the density is out of range",
            expected="a number from 0 to 1",
            found=density,
            hint="correct localize: density",
        )
    # With rationals, from the decimal that the user wrote: 0.15 of 10 is 1.5 and rounds up.
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
        task_vector: the task vector of the finetuned model.
        density: the fraction of all localizable coordinates to keep.
        scratch: the folder for temporary files.
        progress: called with the coordinates done and the total.
    """
    kept = kept_count(density, task_vector.coordinates)
    return top_k(task_vector, kept, scratch=scratch, progress=progress)
