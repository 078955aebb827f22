"""Gram matrices of the inputs of a model's linear layers (Jin et al., ICLR 2023).

G = mean of x^T x over the inputs x of a layer: every position of every row. Rows go through the
model one by one, so that none is padded. Summed and stored in float32. A Gram matrix is symmetric,
so only its upper triangle is stored.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from restitch.merging.errors import BadInput
from restitch.merging.statistics.statistic_file import GRAM, check_finite

VERSION = 1
MOST_ROWS = 1600

# Sends rows through a model, by their indices; the call is made when layers have seen all of them.
Run = Callable[[Sequence[int], Callable[[], None]], None]


class Layer(Protocol):
    """A linear layer, or a part of a module that is one."""

    @property
    def in_features(self) -> int:
        """The number of its inputs."""

    def register_forward_pre_hook(self, hook: Any, /) -> AbstractContextManager[object]:
        """Call a hook with the layer and its arguments before each call, within a block."""


def gram_forms(layers: Mapping[str, Layer]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The type and shape of the packed Gram matrix of each layer."""
    sizes = {name: layer.in_features for name, layer in layers.items()}
    return {name: (torch.float32, (size * (size + 1) // 2,)) for name, size in sizes.items()}


def measure_grams(
    layers: Mapping[str, Layer], rows: int, run: Run, grams: Mapping[str, Tensor]
) -> list[str]:
    """Measure the Gram matrices of layers, in the packed form of `packed`.

    Args:
        layers: the layers by the name of their weight.
        rows: the number of rows; at most the first `MOST_ROWS` are used.
        run: sends rows through the model. Matrices are in memory until it calls.
        grams: receives the matrices, in the forms of `gram_forms`.

    Returns:
        The names of the layers that the rows went through.

    Raises:
        BadInput: there are no rows, or an input is not finite.
    """
    if rows < 1:
        raise BadInput("there are no rows to measure Gram matrices on", expected="at least one row")
    sums = _Sums(grams)
    with ExitStack() as hooks, torch.no_grad():
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(sums.add, name)))
        run(range(min(rows, MOST_ROWS)), sums.store)
    sums.store()
    for name, count in sums.counts.items():
        grams[name].div_(count)
        check_finite(GRAM, {name: grams[name]})
    return list(sums.counts)


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


class _Sums:
    """The sums of some layers in memory, and of all others in the packed matrices."""

    def __init__(self, grams: Mapping[str, Tensor]) -> None:
        self.counts: dict[str, int] = {}
        self._grams = grams
        self._stored: set[str] = set()
        self._open: dict[str, Tensor] = {}

    def add(self, name: str, _: object, args: Any) -> None:
        """Add the products of the inputs of a layer."""
        inputs = args[0].detach().reshape(-1, args[0].shape[-1]).float()
        product = inputs.mT @ inputs
        self._open[name] = self._open[name].add_(product) if name in self._open else product
        self.counts[name] = self.counts.get(name, 0) + len(inputs)

    def store(self) -> None:
        """Add what is in memory to the packed matrices."""
        for name in list(self._open):
            values, kept = packed(self._open.pop(name)), self._grams[name]
            kept.copy_(kept + values.to(kept.device) if name in self._stored else values)
            self._stored.add(name)
