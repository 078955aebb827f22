"""The diagonal of the Fisher matrix of a model: how much its predictions depend on each weight.

F = mean over rows x of the squared gradient of log p(y|x), with y sampled from the model itself,
so no labels are needed (Matena and Raffel, NeurIPS 2022). Rows are processed one by one, because
gradients must be squared before they are summed. Summed in float32 and stored as bfloat16: it has
the range of float32, and a few hundred rows do not give more than eight bits of precision.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from restitch.merging.errors import BadInput
from restitch.merging.localize.fisher import sampled_loss
from restitch.merging.localize.live_weights import consuming_gradients, requiring_gradients
from restitch.merging.progress import Progress, ignore
from restitch.merging.statistics.statistic_file import FISHER, check_finite

VERSION = 1
MOST_ROWS = 256

Batch = dict[str, Tensor]


def measure_fisher(
    parameters: Mapping[str, Tensor],
    names: Sequence[str],
    rows: int,
    batch: Callable[[Sequence[int]], Batch],
    logits: Callable[[Batch], Tensor],
    *,
    seed: int = 0,
    progress: Progress = ignore,
) -> dict[str, Tensor]:
    """Measure the diagonal over some tensors, by name and in their shapes.

    Args:
        parameters: the live tensors of a model with the weights to measure.
        names: the tensors to measure.
        rows: the number of rows; at most `MOST_ROWS` of them are used.
        batch: makes the batch of some rows, by their indices.
        logits: the scores of the classes, [rows, classes] or [rows, positions, classes].
        seed: the seed of the choice of rows and of the sampled classes.
        progress: called with the rows done and the total.

    Raises:
        BadInput: there are no rows, or a gradient is not finite.
        CannotJoin: the model's scores are not finite.
    """
    if rows < 1:
        raise BadInput(
            "there are no rows to measure the Fisher matrix on", expected="at least one row"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows, generator=generator).tolist()[:MOST_ROWS]
    sums = {name: torch.zeros_like(parameters[name], dtype=torch.float32) for name in names}

    def add_squares(name: str) -> None:
        gradient = parameters[name].grad
        assert gradient is not None
        sums[name].addcmul_(gradient, gradient)

    live = ((name, parameters[name]) for name in names)
    with requiring_gradients(parameters, names), consuming_gradients(live, add_squares):
        for done, row in enumerate(order, 1):
            with torch.enable_grad():
                scores = logits(batch([row]))
                torch.autograd.backward(sampled_loss(scores, generator))
            progress(done, len(order))
    for name in names:
        sums[name] = (sums[name] / len(order)).cpu()
    check_finite(FISHER, sums)
    return {name: value.to(torch.bfloat16) for name, value in sums.items()}


def mean_of(diagonal: Mapping[str, Tensor]) -> float:
    """The mean of all entries, in float64 and in the order of the names."""
    total = sum(float(diagonal[name].sum(dtype=torch.float64)) for name in sorted(diagonal))
    return total / max(1, sum(tensor.numel() for tensor in diagonal.values()))
