"""Consensus task arithmetic (Wang et al., ICML 2024); see `rules.consensus`."""

from restitch.merging.files.edits import Edits
from restitch.merging.methods.registry import method
from restitch.merging.rules.consensus import consensus, task_arithmetic_sum
from restitch.merging.rules.merge_inputs import MergeInputs
from restitch.merging.rules.settings import LARGE_COEFFICIENTS


@method(
    name="consensus-ta",
    version=1,
    source="Wang et al., Localizing task information (TALL), ICML 2024, arXiv 2405.07813",
    exact=True,
    whole=True,
    tunes=("alpha", LARGE_COEFFICIENTS),
)
def consensus_ta(
    inputs: MergeInputs,
    *,
    alpha: float = 0.4,
    threshold: float = 0.4,
    agreement: int = 2,
) -> Edits:
    """Base + alpha * (sum of task vectors where at least `agreement` TALL masks are set).

    Args:
        inputs: the base and the members, each with its whole task vector.
        alpha: the coefficient.
        threshold: lambda of the TALL masks.
        agreement: the number of tasks that must agree on a coordinate; at most all members.
    """
    return consensus(inputs, task_arithmetic_sum, alpha, threshold, agreement)
