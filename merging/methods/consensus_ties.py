"""Consensus TIES (Wang et al., ICML 2024): the multi-task vector is TIES with a sum."""

from functools import partial

from restitch.merging.files.edits import Edits
from restitch.merging.methods.registry import method
from restitch.merging.rules.consensus import consensus, ties_sum
from restitch.merging.rules.merge_inputs import MergeInputs
from restitch.merging.rules.settings import LARGE_COEFFICIENTS


@method(
    name="consensus-ties",
    version=1,
    source="Wang et al., Localizing task information (TALL), ICML 2024, arXiv 2405.07813",
    exact=True,
    whole=True,
    tunes=("alpha", LARGE_COEFFICIENTS),
)
def consensus_ties(
    inputs: MergeInputs,
    *,
    density: float = 0.2,
    alpha: float = 0.4,
    threshold: float = 0.4,
    agreement: int = 1,
    trim: str = "model",
) -> Edits:
    """Base + alpha * (TIES sum where at least `agreement` TALL masks are set).

    Args:
        inputs: the base and the members, each with its whole task vector.
        density: the share of each task vector that trimming keeps.
        alpha: the coefficient.
        threshold: lambda of the TALL masks.
        agreement: the number of tasks that must agree; the paper finds 1 better than 2 here.
        trim: `model` ranks the weights of a model together, `tensor` those of each tensor alone.
    """
    return consensus(
        inputs, partial(ties_sum, density=density, trim=trim), alpha, threshold, agreement
    )
