"""TALL masks on task arithmetic (Wang et al., ICML 2024): one specialist per task."""

from restitch.merging.experts.specialists import Experts, PerTask, Selected, SharedExperts, per_task
from restitch.merging.methods.registry import method
from restitch.merging.rules.consensus import THRESHOLDS, MultiTask, tall_mask, task_arithmetic_sum
from restitch.merging.rules.elementwise import Range
from restitch.merging.rules.merge_inputs import MergeInputs


@method(
    name="tall",
    version=1,
    source="Wang et al., Localizing task information (TALL), ICML 2024, arXiv 2405.07813",
    exact=True,
    kind="experts",
    whole=True,
    tunes=("threshold", THRESHOLDS),
)
def tall(inputs: MergeInputs, *, threshold: PerTask = 0.4) -> Experts:
    """Base + (the sum of task vectors where the task's TALL mask is set).

    Args:
        inputs: the base and the members, each with its whole task vector.
        threshold: lambda of the masks, for all tasks or by task.
    """
    return tall_experts(inputs, task_arithmetic_sum, threshold)


def tall_experts(inputs: MergeInputs, multi_task: MultiTask, threshold: PerTask) -> Experts:
    """Base + (a multi-task vector where the task's TALL mask is set); see `tall`."""
    limits = per_task("threshold", threshold, inputs.tasks, 10)
    together = multi_task(inputs.vectors)

    def selected(part: Range) -> Selected:
        whole = together(part)
        return Selected(whole, {i: tall_mask(v, whole, limits[i]) for i, v in part.vectors})

    return SharedExperts(inputs, selected)
