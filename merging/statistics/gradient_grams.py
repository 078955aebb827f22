"""Gram matrices of the gradients at the outputs of a model's linear layers, as in K-FAC.

S = mean over rows of the sum of g g^T over all positions of the row, with g the gradient by the
output of the layer there of the row's scores, each less their mean, added with random signs. With
the Gram matrix G of the layer's inputs, the Kronecker product of S and G approximates the squared
change of the scores by a change of the layer's weights: the Gauss-Newton matrix in the form of
K-FAC (Martens and Grosse, ICML 2015). Labels are not needed. The Fisher matrix, of log p(y|x),
would be nearly 0 for rows of which the model is certain, and a finetuned model is of most
(docs/log.md). Summed and stored in float32, in the packed form of `grams.packed`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from restitch.merging.errors import BadInput
from restitch.merging.localize.live_weights import requiring_gradients
from restitch.merging.progress import Progress, ignore
from restitch.merging.statistics.grams import packed
from restitch.merging.statistics.statistic_file import GRADIENT_GRAM, check_finite

VERSION = 1
MOST_ROWS = 256
# The matrix of a layer with more outputs, such as the head of a language model, passes 1 GB.
MOST_OUTPUTS = 16_384

Batch = dict[str, Tensor]


def measure_gradient_grams(
    layers: Mapping[str, nn.Linear],
    parameters: Mapping[str, Tensor],
    rows: int,
    batch: Callable[[Sequence[int]], Batch],
    logits: Callable[[Batch], Tensor],
    *,
    seed: int = 0,
    progress: Progress = ignore,
) -> dict[str, Tensor]:
    """Measure the matrices of layers; those that no prediction depends on are left out.

    Memory holds the matrices of all layers, outputs x outputs, and the activations of one row.

    Args:
        layers: the layers of a model with the weights to measure, by the name of their weight.
        parameters: all live tensors of the model. None of them gets a gradient.
        rows: the number of rows; at most `MOST_ROWS` of them are used.
        batch: makes the batch of some rows, by their indices.
        logits: the scores of the classes, [rows, classes] or [rows, positions, classes].
        seed: the seed of the choice of rows and of the signs.
        progress: called with the rows done and the total.

    Raises:
        BadInput: there are no rows, or a gradient is not finite.
    """
    if rows < 1:
        raise BadInput("there are no rows to measure gradients on", expected="at least one row")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows, generator=generator).tolist()[:MOST_ROWS]
    sums: dict[str, Tensor] = {}

    def add(name: str, gradient: Tensor) -> None:
        each = gradient.reshape(-1, gradient.shape[-1]).float()
        product = each.mT @ each
        sums[name] = sums[name].add_(product) if name in sums else product

    def watch(name: str, _: nn.Module, _inputs: object, output: Any) -> None:
        if not output.requires_grad:  # of the first layers: nothing before them is learned
            output.requires_grad_()
        output.register_hook(partial(add, name))

    with ExitStack() as hooks, requiring_gradients(parameters, ()):
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(partial(watch, name)))
        for done, row in enumerate(order, 1):
            with torch.enable_grad():
                scores = logits(batch([row]))
                torch.autograd.backward(scores, random_sum(scores, generator))
            progress(done, len(order))
    found = {name: packed(sums[name] / len(order)).cpu() for name in layers if name in sums}
    check_finite(GRADIENT_GRAM, found)
    return found


def random_sum(scores: Tensor, generator: torch.Generator) -> Tensor:
    """The factors of scores in a sum with random signs of scores less their mean.

    A single score is a number, and stays as it is.

    Args:
        scores: along the last dimension.
        generator: on the CPU, for the same signs on any device.
    """
    signs = 2.0 * torch.randint(0, 2, scores.shape, generator=generator) - 1
    if scores.shape[-1] > 1:
        signs -= signs.mean(-1, keepdim=True)
    return signs.to(scores)
