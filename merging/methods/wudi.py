"""WUDI (Cheng et al., ICML 2025): the merged task vector that interferes least with each task.

Minimizes sum_t ||(D - D_t) D_t^T||^2 / ||D_t||^2 over D for each matrix by Adam, from the sum: the
rows of a task's own matrix stand for its inputs. The gradient is 2 (D A - B) with
A = sum_t D_t^T D_t / ||D_t||^2 and B = sum_t D_t D_t^T D_t / ||D_t||^2, both computed once.
"""

import torch
from torch import Tensor

from restitch.merging.files.edits import Edits
from restitch.merging.methods.registry import method
from restitch.merging.rules.merge_inputs import MergeInputs
from restitch.merging.rules.per_matrix import PerMatrix
from restitch.merging.rules.settings import check_range


@method(
    name="wudi",
    version=2,
    source="Cheng et al., Whoever started the interference should end it, ICML 2025, "
    "arXiv 2503.08099",
    exact=False,
    whole=True,
)
def wudi(inputs: MergeInputs, *, steps: int = 300, learning_rate: float = 1e-5) -> Edits:
    """Base + the minimizer of the interference, matrix by matrix.

    Args:
        inputs: the base and the members, each with its whole task vector.
        steps: the number of steps of Adam.
        learning_rate: the learning rate of Adam.
    """
    check_range("steps", steps, 0, 100_000)
    check_range("learning_rate", learning_rate, 0, 1)
    return PerMatrix(inputs, lambda matrix: minimized(matrix.changes, steps, learning_rate))


def minimized(changes: Tensor, steps: int, learning_rate: float) -> Tensor:
    """The merged task vector of one matrix.

    Args:
        changes: task vectors, members x rows x columns.
        steps: the number of steps of Adam.
        learning_rate: the learning rate of Adam.
    """
    # A member that changed nothing here does not count.
    norms = changes.square().sum((1, 2), keepdim=True).clamp_min(torch.finfo().tiny)
    grams = changes.mT @ changes / norms
    a, b = grams.sum(0), (changes @ grams).sum(0)
    merged = torch.nn.Parameter(changes.sum(0))
    adam = torch.optim.Adam([merged], lr=learning_rate)
    with torch.no_grad():
        for _ in range(steps):
            merged.grad = 2 * (merged @ a - b)
            adam.step()
    return merged.detach()
