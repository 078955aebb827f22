"""A linear model for the tests of localizers: small enough for autograd over all of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from restitch.merging.localize.trained import TrainedResult, TrainedSettings, localize_trained
from restitch.merging.ranking.task_vector import TaskVector
from tests import tiny

INPUTS, CLASSES, ROWS = 10, 6, 24
NAMES = ("head.weight", "trunk.weight")


class Linear:
    """Two matrices and a frozen bias; it notes the weights and rows of every loss."""

    def __init__(self, folder: Path, *, seed: int = 0, spread: float = 0.5) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.base = {
            "bias": normal(CLASSES),
            "head.weight": normal(CLASSES, INPUTS),
            "trunk.weight": normal(INPUTS, INPUTS),
        }
        noise = {name: spread * normal(*self.base[name].shape) for name in NAMES}
        self.finetuned = {n: w + noise[n] if n in noise else w for n, w in self.base.items()}
        self.x, self.y = normal(ROWS, INPUTS), torch.arange(ROWS) % CLASSES
        self.live = {name: value.clone() for name, value in self.base.items()}
        self.vector = TaskVector(
            tiny.save(folder / "base", self.base),
            tiny.save(folder / "finetuned", self.finetuned),
            NAMES,
        )
        self.seen: list[Tensor] = []
        self.orders: list[list[int]] = []

    def batch(self, rows: Sequence[int]) -> list[int]:
        self.orders.append(list(rows))
        return list(rows)

    def count_gradients(self) -> list[int]:
        """How many tensors have a gradient, each time that one becomes whole; filled later."""
        alive: list[int] = []

        def count(_: Tensor) -> None:
            alive.append(sum(self.live[name].grad is not None for name in NAMES))

        for name in NAMES:
            tensor: Any = self.live[name].requires_grad_(True)
            tensor.register_post_accumulate_grad_hook(count)
        return alive

    def loss(self, rows: Sequence[int]) -> Tensor:
        self.seen.append(flat(self.live).detach().clone())
        return self.loss_at(self.live, rows)

    def loss_at(self, weights: dict[str, Tensor], rows: Sequence[int]) -> Tensor:
        return F.cross_entropy(self.logits_at(weights, rows), self.y[list(rows)])

    def run(self, settings: TrainedSettings) -> TrainedResult:
        self.seen, self.orders = [], []
        return localize_trained(self.live, self.vector, ROWS, self.batch, self.loss, settings)

    def logits(self, rows: Sequence[int]) -> Tensor:
        self.seen.append(flat(self.live).detach().clone())
        return self.logits_at(self.live, rows)

    def logits_at(self, weights: dict[str, Tensor], rows: Sequence[int]) -> Tensor:
        hidden = self.x[list(rows)] @ weights["trunk.weight"].T
        return hidden @ weights["head.weight"].T + weights["bias"]

    def unflat(self, weights: Tensor) -> dict[str, Tensor]:
        sizes = [self.base[name].numel() for name in NAMES]
        parts = zip(NAMES, torch.split(weights, sizes), strict=True)
        return {"bias": self.base["bias"]} | {n: w.view(self.base[n].shape) for n, w in parts}


def flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weights[name].reshape(-1) for name in NAMES])
