"""TIES-Merging (Yadav et al., NeurIPS 2023); see `rules.ties`."""

from restitch.merging.files.edits import Edits
from restitch.merging.methods.registry import method
from restitch.merging.rules.elementwise import Elementwise, scale_in_place
from restitch.merging.rules.merge_inputs import MergeInputs
from restitch.merging.rules.settings import LARGE_COEFFICIENTS, check_range
from restitch.merging.rules.ties import Trim, disjoint_merge


@method(
    name="ties",
    version=1,
    source="Yadav et al., TIES-Merging, NeurIPS 2023, arXiv 2306.01708",
    exact=True,
    whole=True,
    tunes=("alpha", LARGE_COEFFICIENTS),
)
def ties(
    inputs: MergeInputs,
    *,
    density: float = 0.2,
    alpha: float = 1.0,
    trim: str = "model",
) -> Edits:
    """Base + alpha * disjoint mean of the trimmed task vectors.

    Args:
        inputs: the base and the members, each with its whole task vector.
        density: the share of each task vector that trimming keeps.
        alpha: the coefficient.
        trim: `model` ranks the weights of a model together, `tensor` those of each tensor alone.
    """
    check_range("alpha", alpha, 0, 10)
    kept = Trim(inputs.vectors, density, trim)
    return Elementwise(
        inputs.base,
        inputs.vectors,
        lambda part: scale_in_place(disjoint_merge(kept.apply(part), mean=True), alpha),
    )
