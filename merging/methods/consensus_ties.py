"""Consensus TIES (Wang et al., ICML 2024): the multi-task vector is TIES with a sum."""

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
)
from restitch.merging.rules.stitch import DeltaMember
from restitch.merging.rules.ties import Trim, disjoint_merge


@method(
    name="consensus-ties",
    version=1,
    source="Wang et al., Localizing task information (TALL), ICML 2024, arXiv 2405.07813",
    exact=True,
    whole=True,
    tunes=("alpha", COEFFICIENTS),
)
def consensus_ties(
    base: Checkpoint,
    members: Iterable[DeltaMember],
    *,
    density: float = 0.2,
    alpha: float = 0.4,
    threshold: float = 0.4,
    agreement: int = 1,
    trim: str = "model",
) -> Edits:
    """Base + alpha * (TIES sum where at least `agreement` TALL masks are set).

    Args:
        base: the base's checkpoint.
        members: the members, each with its whole task vector.
        density: the share of each task vector that trimming keeps.
        alpha: the coefficient.
        threshold: lambda of the TALL masks.
        agreement: the number of tasks that must agree; the paper finds 1 better than 2 here.
        trim: `model` ranks the weights of a model together, `tensor` those of each tensor alone.
    """
    check_range("alpha", alpha, 0, 10)
    check_range("threshold", threshold, 0, 10)
    check_range("agreement", agreement, 1, 1 << 15)
    vectors = kept_vectors(base, members)
    kept, needed = Trim(vectors, density, trim), min(agreement, len(vectors))

    def merged(part: Range) -> Floats:
        own = [(number, vector.copy()) for number, vector in part.vectors]
        together = disjoint_merge(kept.apply(part), mean=False)
        return alpha * consensus_vector(own, together, threshold, needed)

    return Elementwise(base, vectors, merged)
