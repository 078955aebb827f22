"""RegMean (Jin et al., ICLR 2023): linear layers with outputs closest to those of each task."""

from collections.abc import Iterable

import torch
from torch import Tensor

from restitch.merging.files.edits import Edits
from restitch.merging.methods.registry import method
from restitch.merging.rules.merge_inputs import MergeInputs
from restitch.merging.rules.per_matrix import Matrix, PerMatrix
from restitch.merging.rules.settings import check_range
from restitch.merging.statistics.grams import unpacked
from restitch.merging.statistics.statistic_file import GRAM, statistics_of

# Added to the diagonal, as a share of its mean, since inputs may always be 0.
_RIDGE = 1e-6


@method(
    name="regmean",
    version=1,
    source="Jin et al., Dataless knowledge fusion by merging weights, ICLR 2023, arXiv 2212.09849",
    exact=False,
    whole=True,
    needs=(GRAM,),
    tunes=("scale", tuple(n / 10 for n in range(1, 11))),
)
def regmean(inputs: MergeInputs, *, scale: float = 0.9) -> Edits:
    """Base + (sum tau_t G_t) (sum G_t)^-1 for linear layers, the mean for other tensors.

    That is W = (sum W_t G_t) (sum G_t)^-1, which minimizes sum |X_t (W - W_t)^T|^2 over the inputs
    X_t of the layer in the finetuned models, with rows of W as outputs.

    Args:
        inputs: the base and the members, each with its whole task vector and its Gram matrices.
        scale: the factor of the Gram matrices' entries outside of the diagonal.
    """
    check_range("scale", scale, 0, 1)
    statistics = statistics_of(inputs.members, GRAM)

    def merged(matrix: Matrix) -> Tensor:
        own = [statistics[number] for number in matrix.members]
        if not all(matrix.name in statistic for statistic in own):
            return matrix.changes.sum(0) / len(statistics)  # not a linear layer, but an embedding
        size = matrix.changes.shape[2]
        grams = [unpacked(statistic.tensor(matrix.name), size) for statistic in own]
        return solved(matrix.changes, grams, scale).float()

    # Inputs of a layer lie outside of the space that the factors span.
    return PerMatrix(inputs, merged, in_core=False)


def solved(changes: Tensor, grams: Iterable[Tensor], scale: float) -> Tensor:
    """The merged task vector of one layer, in float64.

    Args:
        changes: task vectors, members x outputs x inputs.
        grams: the Gram matrix of each member, inputs x inputs.
        scale: see `regmean`.
    """
    wide = torch.zeros((), dtype=torch.float64, device=changes.device)
    outputs = wide.new_zeros(changes.shape[1:])
    together = wide.new_zeros((changes.shape[2],) * 2)
    for change, own in zip(changes, grams, strict=True):
        gram = own.to(wide)
        diagonal = gram.diagonal()
        least = _RIDGE * diagonal.mean().clamp_min(torch.finfo().tiny)
        weighed = scale * gram + torch.diag((1 - scale) * diagonal + least)
        outputs += change.double() @ weighed
        together += weighed
    solution: Tensor = torch.linalg.solve(together, outputs, left=False)
    return solution
