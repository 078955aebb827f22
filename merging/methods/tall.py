"""TALL masks on task arithmetic (Wang et al., ICML 2024): one specialist per task."""

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
from restitch.merging.rules.elementwise import Range, sum_vectors
from restitch.merging.rules.stitch import DeltaMember


@method(
    name="tall",
    version=1,
    source="Wang et al., Localizing task information (TALL), ICML 2024, arXiv 2405.07813",
    exact=True,
    kind="experts",
    whole=True,
    tunes=("threshold", THRESHOLDS),
)
def tall(base: Checkpoint, members: Iterable[DeltaMember], *, threshold: PerTask = 0.4) -> Experts:
    """Base + (the sum of task vectors where the task's TALL mask is set).

    Args:
        base: the base's checkpoint.
        members: the members, each with its whole task vector.
        threshold: lambda of the masks, for all tasks or by task.
    """
    tasks, vectors = tasks_and_vectors(base, members)
    limits = per_task("threshold", threshold, tasks, 10)

    def selected(part: Range) -> Selected:
        together = sum_vectors(part.vectors)
        masks = {i: tall_mask(vector, together, limits[i]) for i, vector in part.vectors}
        return Selected(together, masks)

    return SharedExperts(base, tasks, vectors, selected)
