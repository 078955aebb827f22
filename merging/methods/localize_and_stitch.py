"""Localize-and-Stitch (He et al., TMLR 2025): the mean over owners, no coefficient."""

from restitch.merging.files.edits import Edits
from restitch.merging.methods.registry import method
from restitch.merging.rules.merge_inputs import MergeInputs
from restitch.merging.rules.stitch import VERSION, stitch


@method(
    name="localize-and-stitch",
    version=VERSION,
    source="He et al., Localize-and-Stitch, TMLR 2025, arXiv 2408.13656",
    exact=True,
)
def localize_and_stitch(inputs: MergeInputs, *, overlap: str = "mean") -> Edits:
    """Overwrite each kept coordinate with the mean of its owners' finetuned values.

    Args:
        inputs: the base and the members, each with its sparse delta.
        overlap: the rule for coordinates with several owners: mean, sum, weighted or elect.
    """
    return stitch(inputs.base, inputs.members, overlap)
