"""Weighted stitch: localize-and-stitch with a weighted mean on shared coordinates.

On a shared coordinate the owners' differences from the base are averaged by their importance (the
entries of the Fisher diagonals, which deltas of `fisher` and `distilled` contain). The average is
multiplied by the number of owners to the power `growth`: where many members meet, a plain average
loses skill and a sum goes too far (docs/results/).
"""

from restitch.merging.files.edits import Edits
from restitch.merging.methods.registry import method
from restitch.merging.rules.merge_inputs import MergeInputs
from restitch.merging.rules.overlaps import owner_growth
from restitch.merging.rules.stitch import stitch


@method(
    name="weighted-stitch",
    version=1,
    source="after He et al., TMLR 2025, and Matena and Raffel, NeurIPS 2022; docs/results/",
    exact=True,
    tunes=("growth", (0.0, 0.25, 0.5, 0.75, 1.0)),
)
def weighted_stitch(inputs: MergeInputs, *, growth: float = 0.5) -> Edits:
    """Overwrite each kept coordinate, with a scaled weighted mean on shared ones.

    Args:
        inputs: the base and the members; a member whose delta does not contain importance
            factors counts as much as the other owners on average.
        growth: 0 averages, 1 sums; a multiple of a quarter.
    """
    return stitch(inputs.base, inputs.members, owner_growth(growth))
