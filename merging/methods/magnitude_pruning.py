"""Magnitude pruning (a baseline of Wang et al., ICML 2024): each task keeps its largest changes.

It needs as much space as TALL masks: T pruned vectors, each with 1/T of the weights and one bit
per weight for their positions, are as large as one whole vector and T masks.
"""

from collections.abc import Iterable

from restitch.merging.experts.specialists import Experts, OwnExperts, tasks_and_vectors
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.edits import Edits
from restitch.merging.methods.registry import method
from restitch.merging.ranking.kept_vector import KeptVector
from restitch.merging.rules.elementwise import Elementwise, Floats, Range
from restitch.merging.rules.stitch import DeltaMember
from restitch.merging.rules.ties import Trim


@method(
    name="magnitude-pruning",
    version=1,
    source="Wang et al., Localizing task information (TALL), ICML 2024, arXiv 2405.07813",
    exact=True,
    kind="experts",
    whole=True,
)
def magnitude_pruning(base: Checkpoint, members: Iterable[DeltaMember]) -> Experts:
    """Base + (the largest 1/T of the task's own vector, over the whole model).

    Args:
        base: the base's checkpoint.
        members: the members, each with its whole task vector.
    """
    tasks, vectors = tasks_and_vectors(base, members)
    pruned = {t: _pruned(base, v, 1 / len(tasks)) for t, v in zip(tasks, vectors, strict=True)}
    return OwnExperts(pruned)


def _pruned(base: Checkpoint, vector: KeptVector, share: float) -> Edits:
    kept = Trim([vector], share, "model")

    def largest(part: Range) -> Floats:
        [(_, trimmed)] = kept.apply(part)
        return trimmed

    return Elementwise(base, [vector], largest)
