"""MaTS (Tam et al., TMLR 2024): weights that match each member where its predictions need it.

Merging as a system of linear equations, solved by conjugate gradients from another merge. The paper
lets the user choose the matrices of the system and the start: here these are Gauss-Newton matrices
by K-FAC (`statistics.gradient_grams`; the paper's are Fisher matrices) and the result of `tsv-m`.
Each member's matrices are divided by their mean, so that all tasks count the same, and the
equations are damped.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.edits import Edits
from restitch.merging.methods.registry import method
from restitch.merging.methods.tsv_m import merged as merged_by_tsv_m
from restitch.merging.rules.merge_inputs import MergeInputs
from restitch.merging.rules.per_matrix import Matrix, PerMatrix
from restitch.merging.rules.settings import check_range
from restitch.merging.statistics.grams import unpacked
from restitch.merging.statistics.statistic_file import GRADIENT_GRAM, GRAM, statistics_of


@method(
    name="mats",
    version=1,
    source="Tam et al., Merging by matching models in task parameter subspaces, TMLR 2024, "
    "arXiv 2312.04339",
    exact=False,
    whole=True,
    needs=(GRAM, GRADIENT_GRAM),
)
def mats(
    inputs: MergeInputs, *, alpha: float = 1.0, damping: float = 0.1, steps: int = 10
) -> Edits:
    """Base + the change D that minimizes sum_t norm(S_t^1/2 (D - tau_t) G_t^1/2)^2.

    Matrices without these statistics are merged by `tsv-m`, and tensors of other shapes get the
    mean.

    Args:
        inputs: the base and the members, each with its whole task vector, the Gram matrices G_t of
            its layers' inputs, and those of the gradients at their outputs, S_t.
        alpha: the coefficient of `tsv-m`, the start.
        damping: how much the distance to the start counts, as a share of the mean eigenvalue.
        steps: of conjugate gradients.
    """
    check_range("alpha", alpha, 0, 10)
    check_range("damping", damping, 0, 1000)
    check_range("steps", steps, 0, 10_000)
    grams, gradients = (statistics_of(inputs.members, kind) for kind in (GRAM, GRADIENT_GRAM))

    def merged(matrix: Matrix) -> Tensor:
        start = alpha * merged_by_tsv_m(matrix.changes, matrix.rank)
        height, width = matrix.changes.shape[1:]
        at_inputs = _stacked(grams, matrix, width)
        at_outputs = _stacked(gradients, matrix, height)
        if at_inputs is None or at_outputs is None:
            return start
        return solved(matrix.changes, at_inputs, at_outputs, start, damping, steps)

    # Inputs of a layer lie outside of the space that the factors span.
    return PerMatrix(inputs, merged, in_core=False)


def solved(
    changes: Tensor, grams: Tensor, gradients: Tensor, start: Tensor, damping: float, steps: int
) -> Tensor:
    """The merged task vector of one layer: sum_t S_t (D - tau_t) G_t + mu (D - start) = 0.

    Solved by conjugate gradients, preconditioned with the diagonal of the equations.

    Args:
        changes: task vectors, members x outputs x inputs.
        grams: G_t, members x inputs x inputs.
        gradients: S_t, members x outputs x outputs; each is divided by the mean of its diagonal.
        start: outputs x inputs.
        damping: mu, as a share of the mean of the other factors of D in the equations.
        steps: the largest number of steps.
    """
    at_outputs, at_inputs = (each.diagonal(dim1=1, dim2=2) for each in (gradients, grams))
    tiny = torch.finfo(changes.dtype).tiny
    gradients = gradients / at_outputs.mean(1)[:, None, None].clamp_min(tiny)
    diagonal = gradients.diagonal(dim1=1, dim2=2).mT @ at_inputs
    mu = (damping * diagonal.mean()).clamp_min(tiny)
    found, left = start.clone(), (gradients @ (changes - start) @ grams).sum(0)
    towards, size = torch.zeros_like(start), left.new_ones(())
    for _ in range(steps):
        scaled = left / (diagonal + mu)
        before, size = size, (left * scaled).sum()
        if not size > tiny:  # solved; without inputs or gradients it is from the start
            break
        towards = scaled + towards * (size / before)
        answer = (gradients @ towards @ grams).sum(0) + mu * towards
        step = size / (towards * answer).sum()
        found += step * towards
        left -= step * answer
    return found


def _stacked(statistics: Sequence[Checkpoint], matrix: Matrix, size: int) -> Tensor | None:
    """The matrices of the members that have the tensor; None if one of them is missing."""
    own = [statistics[number] for number in matrix.members]
    if not all(matrix.name in statistic for statistic in own):
        return None
    found = [unpacked(one.tensor(matrix.name), size).float() for one in own]
    return torch.stack(found).to(matrix.changes.device)
