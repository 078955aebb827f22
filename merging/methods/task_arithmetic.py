"""Task arithmetic (Ilharco et al., ICLR 2023): the sum of the task vectors, times a coefficient."""

from collections.abc import Iterable

from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.edits import Edits
from restitch.merging.methods.registry import method
from restitch.merging.rules.elementwise import (
    COEFFICIENTS,
    Elementwise,
    check_range,
    kept_vectors,
    scale_in_place,
    sum_vectors,
)
from restitch.merging.rules.stitch import DeltaMember


@method(
    name="task-arithmetic",
    version=1,
    source="Ilharco et al., Editing models with task arithmetic, ICLR 2023, arXiv 2212.04089",
    exact=True,
    whole=True,
    tunes=("alpha", COEFFICIENTS),
)
def task_arithmetic(
    base: Checkpoint, members: Iterable[DeltaMember], *, alpha: float = 0.4
) -> Edits:
    """Base + alpha * sum of task vectors.

    Args:
        base: the base's checkpoint.
        members: the members, each with its whole task vector.
        alpha: the coefficient; the paper recommends 0.4 without tuning.
    """
    check_range("alpha", alpha, 0, 10)
    vectors = kept_vectors(base, members)
    return Elementwise(
        base, vectors, lambda part: scale_in_place(sum_vectors(part.vectors, reuse=True), alpha)
    )
