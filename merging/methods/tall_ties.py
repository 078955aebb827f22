"""TALL masks on TIES (Wang et al., ICML 2024): the shared vector is TIES with a sum, not a mean."""

from collections.abc import Iterable

from restitch.merging.experts.specialists import (
    Experts,
    PerTask,
    Selected,
    SharedExperts,
    per_task,
    tasks_and_vectors,
)
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.methods.registry import method
from restitch.merging.rules.consensus import THRESHOLDS, tall_mask
from restitch.merging.rules.elementwise import Range
from restitch.merging.rules.stitch import DeltaMember
from restitch.merging.rules.ties import Trim, disjoint_merge


@method(
    name="tall-ties",
    version=1,
    source="Wang et al., Localizing task information (TALL), ICML 2024, arXiv 2405.07813",
    exact=True,
    kind="experts",
    whole=True,
    tunes=("threshold", THRESHOLDS),
)
def tall_ties(
    base: Checkpoint,
    members: Iterable[DeltaMember],
    *,
    threshold: PerTask = 0.4,
    density: float = 0.2,
    trim: str = "model",
) -> Experts:
    """Base + (the TIES sum where the task's TALL mask is set).

    Args:
        base: the base's checkpoint.
        members: the members, each with its whole task vector.
        threshold: lambda of the masks, for all tasks or by task.
        density: the share of each task vector that trimming keeps.
        trim: `model` ranks the weights of a model together, `tensor` those of each tensor alone.
    """
    tasks, vectors = tasks_and_vectors(base, members)
    limits = per_task("threshold", threshold, tasks, 10)
    kept = Trim(vectors, density, trim)

    def selected(part: Range) -> Selected:
        own = [(i, vector.copy()) for i, vector in part.vectors]
        together = disjoint_merge(kept.apply(part), mean=False)
        return Selected(together, {i: tall_mask(v, together, limits[i]) for i, v in own})

    return SharedExperts(base, tasks, vectors, selected)
