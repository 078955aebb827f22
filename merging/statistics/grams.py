"""Gram matrices of the inputs of a model's linear layers (Jin et al., ICLR 2023).

G = mean of x^T x over the inputs x of a layer: every position of every row. Rows go through the
model one by one, so that none is padded. Summed and stored in float32. A Gram matrix is symmetric,
so only its upper triangle is stored.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from restitch.merging.errors import BadInput
from restitch.merging.progress import Progress, ignore
from restitch.merging.statistics.statistic_file import GRAM, check_finite

VERSION = 1
MOST_ROWS = 1600


def measure_grams(
    layers: Mapping[str, nn.Module],
    rows: int,
    forward: Callable[[int], object],
    *,
    progress: Progress = ignore,
) -> dict[str, Tensor]:
    """Measure the Gram matrices of layers, in the packed form of `packed`.

    Args:
        layers: the layers by the name of their weight.
        rows: the number of rows; at most the first `MOST_ROWS` are used.
        forward: sends a row through the model, by its index.
        progress: called with the rows done and the total.

    Raises:
        BadInput: there are no rows, or an input is not finite.
    """
    if rows < 1:
        raise BadInput("there are no rows to measure Gram matrices on", expected="at least one row")
    sums: dict[str, tuple[Tensor, int]] = {}
    count = min(rows, MOST_ROWS)
    with ExitStack() as hooks, torch.no_grad():
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(_add, sums, name)))
        for row in range(count):
            forward(row)
            progress(row + 1, count)
    grams = {name: (total / inputs).cpu() for name, (total, inputs) in sums.items()}
    check_finite(GRAM, grams)
    return {name: packed(gram) for name, gram in grams.items()}


def packed(gram: Tensor) -> Tensor:
    """The upper triangle of a symmetric matrix, row by row."""
    return torch.cat([gram[row, row:] for row in range(len(gram))])


def unpacked(values: Tensor, size: int) -> Tensor:
    """The symmetric matrix of its packed form, in float64.

    Raises:
        BadInput: the values do not fit a matrix of this size.
    """
    if tuple(values.shape) != (size * (size + 1) // 2,):
        raise BadInput(
            "a Gram matrix does not fit its layer",
            expected=f"{size * (size + 1) // 2} numbers for {size} inputs",
            found=list(values.shape),
        )
    gram = torch.empty((size, size), dtype=torch.float64)
    start = 0
    for row in range(size):
        stop = start + size - row
        gram[row, row:] = values[start:stop]
        gram[row:, row] = values[start:stop]
        start = stop
    return gram


def _add(sums: dict[str, tuple[Tensor, int]], name: str, _: nn.Module, args: Any) -> None:
    inputs = args[0].detach().reshape(-1, args[0].shape[-1]).float()
    product = inputs.mT @ inputs
    total, count = sums.get(name, (None, 0))
    sums[name] = (product if total is None else total.add_(product), count + len(inputs))
