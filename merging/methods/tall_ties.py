"""TALL masks on TIES (Wang et al., ICML 2024): the shared vector is TIES with a sum, not a mean."""

from functools import partial

from restitch.merging.experts.specialists import Experts, PerTask
from restitch.merging.methods.registry import method
from restitch.merging.methods.tall import tall_experts
from restitch.merging.rules.consensus import THRESHOLDS, ties_sum
from restitch.merging.rules.merge_inputs import MergeInputs


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
    inputs: MergeInputs,
    *,
    threshold: PerTask = 0.4,
    density: float = 0.2,
    trim: str = "model",
) -> Experts:
    """Base + (the TIES sum where the task's TALL mask is set).

    Args:
        inputs: the base and the members, each with its whole task vector.
        threshold: lambda of the masks, for all tasks or by task.
        density: the share of each task vector that trimming keeps.
        trim: `model` ranks the weights of a model together, `tensor` those of each tensor alone.
    """
    return tall_experts(inputs, partial(ties_sum, density=density, trim=trim), threshold)
