"""RegMean (Jin et al., ICLR 2023): linear layers that answer each task's inputs as its own do."""

from collections.abc import Iterable

import torch
from torch import Tensor

from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.edits import Edits
from restitch.merging.methods.registry import method
from restitch.merging.rules.elementwise import check_range
from restitch.merging.rules.per_matrix import Matrix, PerMatrix
from restitch.merging.rules.stitch import DeltaMember
from restitch.merging.statistics.grams import unpacked
from restitch.merging.statistics.statistic_file import GRAM, statistics_of

# Added to the diagonal, as a share of its mean: inputs that are always 0 decide nothing.
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
def regmean(base: Checkpoint, members: Iterable[DeltaMember], *, scale: float = 0.9) -> Edits:
    """Base + (sum tau_t G_t) (sum G_t)^-1 for linear layers, the mean for other tensors.

    That is W = (sum W_t G_t) (sum G_t)^-1, which minimizes sum |X_t (W - W_t)^T|^2 over the inputs
    X_t of the layer in the finetuned models, with rows of W as outputs.

    Args:
        base: the base's checkpoint.
        members: the members, each with its whole task vector and its Gram matrices.
        scale: what the Gram matrices' entries beside the diagonal are multiplied with.
    """
    check_range("scale", scale, 0, 1)
    given = tuple(members)
    grams = statistics_of(given, GRAM)

    def merged(matrix: Matrix) -> Tensor:
        there = [grams[number] for number in matrix.members]
        if not all(matrix.name in statistic for statistic in there):
            return matrix.changes.sum(0) / len(grams)  # no linear layer, such as an embedding
        size = matrix.changes.shape[2]
        inputs = [unpacked(statistic.tensor(matrix.name), size) for statistic in there]
        return solved(matrix.changes, inputs, scale).float()

    return PerMatrix(base, given, merged)


def solved(changes: Tensor, grams: Iterable[Tensor], scale: float) -> Tensor:
    """The merged task vector of one layer, in float64.

    Args:
        changes: task vectors, members x outputs x inputs.
        grams: of each member, inputs x inputs.
        scale: see `regmean`.
    """
    wide = torch.zeros((), dtype=torch.float64, device=changes.device)
    wanted = wide.new_zeros(changes.shape[1:])
    together = wide.new_zeros((changes.shape[2],) * 2)
    for change, given in zip(changes, grams, strict=True):
        gram = given.to(wide)
        diagonal = gram.diagonal()
        least = _RIDGE * diagonal.mean().clamp_min(torch.finfo().tiny)
        weighed = scale * gram + torch.diag((1 - scale) * diagonal + least)
        wanted += change.double() @ weighed
        together += weighed
    found: Tensor = torch.linalg.solve(together, wanted, left=False)
    return found
