"""Consensus task arithmetic (Wang et al., ICML 2024); see `rules.consensus`."""

from collections.abc import Iterable

from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.edits import Edits
from restitch.merging.methods.registry import method
from restitch.merging.rules.consensus import consensus_vector
from restitch.merging.rules.elementwise import (
    COEFFICIENTS,
    Elementwise,
    Floats,
    Range,
    check_range,
    kept_vectors,
    sum_vectors,
)
from restitch.merging.rules.stitch import DeltaMember


@method(
    name="consensus-ta",
    version=1,
    source="Wang et al., Localizing task information (TALL), ICML 2024, arXiv 2405.07813",
    exact=True,
    whole=True,
    tunes=("alpha", COEFFICIENTS),
)
def consensus_ta(
    base: Checkpoint,
    members: Iterable[DeltaMember],
    *,
    alpha: float = 0.4,
    threshold: float = 0.4,
    agreement: int = 2,
) -> Edits:
    """Base + alpha * (sum of task vectors where at least `agreement` TALL masks are set).

    Args:
        base: the base's checkpoint.
        members: the members, each with its whole task vector.
        alpha: the coefficient.
        threshold: lambda of the TALL masks.
        agreement: the number of tasks that must agree on a coordinate; at most all members.
    """
    check_range("alpha", alpha, 0, 10)
    check_range("threshold", threshold, 0, 10)
    check_range("agreement", agreement, 1, 1 << 15)
    vectors = kept_vectors(base, members)
    needed = min(agreement, len(vectors))

    def merged(part: Range) -> Floats:
        together = sum_vectors(part.vectors)
        return alpha * consensus_vector(part.vectors, together, threshold, needed)

    return Elementwise(base, vectors, merged)
