"""Magnitude masking (a baseline of Wang et al., ICML 2024): masks of the largest changes."""

from restitch.merging.experts.specialists import Experts, Selected, SharedExperts
from restitch.merging.methods.registry import method
from restitch.merging.rules.elementwise import Range, sum_vectors
from restitch.merging.rules.merge_inputs import MergeInputs
from restitch.merging.rules.ties import Trim


@method(
    name="magnitude-masking",
    version=1,
    source="Wang et al., Localizing task information (TALL), ICML 2024, arXiv 2405.07813",
    exact=True,
    kind="experts",
    whole=True,
)
def magnitude_masking(inputs: MergeInputs, *, density: float = 0.1) -> Experts:
    """Base + (the sum of task vectors where the task's own is among its largest).

    Args:
        inputs: the base and the members, each with its whole task vector.
        density: the share of the model's weights in each task's mask.
    """
    kept = Trim(inputs.vectors, density, "model")

    def selected(part: Range) -> Selected:
        together = sum_vectors(part.vectors)
        return Selected(together, {i: vector != 0 for i, vector in kept.apply(part)})

    return SharedExperts(inputs, selected)
