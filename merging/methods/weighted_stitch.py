"""restitch: localize-and-stitch with a rule for shared coordinates that was chosen by measuring.

Where several members keep a coordinate, their differences from the base are averaged by what the
coordinate is worth to each (the entries of its Fisher diagonal, which deltas found by `fisher` or
`distilled` carry), and the average is multiplied by the number of owners to the power `growth`: a
plain average loses skill where many members meet, a sum goes too far (docs/results/).
"""

from collections.abc import Iterable

from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.edits import Edits
from restitch.merging.methods.registry import method
from restitch.merging.rules.overlaps import owner_growth
from restitch.merging.rules.stitch import DeltaMember, stitch


@method(
    name="weighted-stitch",
    version=1,
    source="after He et al., TMLR 2025, and Matena and Raffel, NeurIPS 2022; docs/results/",
    exact=True,
    tunes=("growth", (0.0, 0.25, 0.5, 0.75, 1.0)),
)
def weighted_stitch(
    base: Checkpoint, members: Iterable[DeltaMember], *, growth: float = 0.5
) -> Edits:
    """Overwrite each kept coordinate; on shared ones a weighted mean of differences, grown.

    Args:
        base: the base's checkpoint.
        members: the members; one whose delta does not say what its coordinates are worth
            counts as much as the others that share them do on average.
        growth: 0 averages, 1 sums; a multiple of a quarter.
    """
    return stitch(base, members, owner_growth(growth))
