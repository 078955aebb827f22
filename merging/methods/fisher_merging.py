"""Fisher merging (Matena and Raffel, 2022): the mean of the weights by their Fisher diagonals."""

import numpy as np
import torch

from restitch.merging.files.edits import Edits
from restitch.merging.methods.registry import method
from restitch.merging.numerics.rounding import cast
from restitch.merging.rules.elementwise import Elementwise, Floats, Range, sum_arrays
from restitch.merging.rules.merge_inputs import MergeInputs
from restitch.merging.rules.settings import check_choice, check_range
from restitch.merging.statistics.statistic_file import FISHER, check_fits, statistics_of


@method(
    name="fisher-merging",
    version=1,
    source="Matena and Raffel, Merging models with Fisher-weighted averaging, NeurIPS 2022, "
    "arXiv 2111.09832",
    exact=True,
    whole=True,
    needs=(FISHER,),
)
def fisher_merging(inputs: MergeInputs, *, scale: str = "mean", floor: float = 1e-6) -> Edits:
    """Base + sum F_t tau_t / sum F_t, which is sum F_t W_t / sum F_t.

    Args:
        inputs: the base and the members, each with its whole task vector and its Fisher diagonal.
        scale: `mean` divides each member's diagonal by its mean, so that a member with less
            certain predictions does not count more everywhere; `none` does not.
        floor: the amount added to each entry, as a share of the mean of the member's diagonal;
            weights that no row depends on get the mean.
    """
    check_range("floor", floor, 1e-12, 1)
    check_choice("scale", scale, ("mean", "none"))
    diagonals = statistics_of(inputs.members, FISHER)
    for vector, diagonal in zip(inputs.vectors, diagonals, strict=True):
        check_fits(FISHER, diagonal, {name: vector.numel(name) for name in vector.names})
    means = [float(diagonal.metadata["mean"]) or 1.0 for diagonal in diagonals]

    def importance(part: Range, number: int, like: Floats) -> Floats:
        """The entries of a member's diagonal on a range, scaled and with the floor."""
        diagonal, mean = diagonals[number], means[number]
        flat = diagonal.tensor(part.name).view(-1)[part.start : part.start + len(like)]
        entries: Floats = cast(flat, torch.from_numpy(like).dtype).numpy()
        entries = entries / mean + floor
        return entries if scale == "mean" else entries * mean

    def merged(part: Range) -> Floats:
        weights = [importance(part, number, vector) for number, vector in part.vectors]
        weighted = [w * v for w, (_, v) in zip(weights, part.vectors, strict=True)]
        return np.asarray(sum_arrays(weighted) / sum_arrays(weights))

    return Elementwise(inputs.base, inputs.vectors, merged)
