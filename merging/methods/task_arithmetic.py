"""Task arithmetic (Ilharco et al., ICLR 2023): the sum of the task vectors, times a coefficient."""

from restitch.merging.files.edits import Edits
from restitch.merging.methods.registry import method
from restitch.merging.rules.elementwise import (
    Elementwise,
    scale_in_place,
    sum_vectors,
)
from restitch.merging.rules.merge_inputs import MergeInputs
from restitch.merging.rules.settings import COEFFICIENTS, check_range


@method(
    name="task-arithmetic",
    version=1,
    source="Ilharco et al., Editing models with task arithmetic, ICLR 2023, arXiv 2212.04089",
    exact=True,
    whole=True,
    tunes=("alpha", COEFFICIENTS),
)
def task_arithmetic(inputs: MergeInputs, *, alpha: float = 0.4) -> Edits:
    """Base + alpha * sum of task vectors.

    Args:
        inputs: the base and the members, each with its whole task vector.
        alpha: the coefficient; the paper recommends 0.4 without tuning.
    """
    check_range("alpha", alpha, 0, 10)
    return Elementwise(
        inputs.base,
        inputs.vectors,
        lambda part: scale_in_place(sum_vectors(part.vectors, reuse=True), alpha),
    )
