"""One coefficient per task and tensor, learned so that the merged model is sure of its answers.

AdaMerging, layer-wise (Yang et al., ICLR 2024): W_l = W0_l + sum_t lambda_tl * tau_tl, and the
lambdas minimize the sum over tasks of the mean entropy of the merged model's predictions on
unlabelled rows, by Adam. They are kept between 0 and 1 as in the authors' code. Gradients of
weights are taken through the live model and projected on the task vectors, which lie beside it in
float32: one model's size for each task.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.order import by_bytes
from restitch.merging.progress import Progress, ignore
from restitch.merging.ranking.kept_vector import KeptVector
from restitch.merging.statistics.statistic_file import (
    COEFFICIENTS,
    check_finite,
    requiring_gradients,
)

VERSION = 1


@dataclass(frozen=True)
class CoefficientSettings:
    """How coefficients are learned.

    Attributes:
        steps: of Adam; each sees one batch of every task.
        learning_rate: of Adam.
        start: what all coefficients are at first.
        batch: rows of a batch.
        seed: the order of rows.
    """

    steps: int
    learning_rate: float
    start: float
    batch: int
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Everything that determines the coefficients beside weights and rows."""
        return asdict(self)


def learn_coefficients(
    parameters: Mapping[str, Tensor],
    base: Checkpoint,
    vectors: Sequence[KeptVector],
    rows: Sequence[int],
    logits: Callable[[int, Sequence[int]], Tensor],
    settings: CoefficientSettings,
    *,
    progress: Progress = ignore,
) -> dict[str, Tensor]:
    """The coefficients of each tensor: float64, in the order of the vectors.

    Args:
        parameters: the live tensors of the loaded base; their weights are altered, and are the
            caller's to restore.
        base: the base's checkpoint.
        vectors: the task vectors.
        rows: how many rows each task has.
        logits: the scores at the live weights for some rows of a task, by its number and theirs.
        settings: how.
        progress: called with the steps done and the steps in all.

    Raises:
        BadInput: a task has no rows, or what is learned is not finite.
    """
    if min(rows, default=0) < 1:
        raise BadInput("there are no rows to learn coefficients on", expected="some of every task")
    names = sorted({name for vector in vectors for name in vector.names}, key=by_bytes)
    where = {name: parameters[name].device for name in names}
    befores = {name: base.tensor(name).float().to(where[name]) for name in names}
    stacks = {name: _stack(base, vectors, name).to(where[name]) for name in names}
    shape = (len(names), len(vectors))
    raw = torch.nn.Parameter(torch.full(shape, settings.start, dtype=torch.float64))
    adam = torch.optim.Adam([raw], lr=settings.learning_rate)
    streams = [_Stream(count, settings, number) for number, count in enumerate(rows)]
    with requiring_gradients(parameters, names) as drop:
        for step in range(settings.steps):
            _set_weights(parameters, befores, stacks, raw.detach().clamp(0, 1))
            for number, stream in enumerate(streams):
                with torch.enable_grad():
                    loss = entropy(logits(number, stream.next_batch()))
                    torch.autograd.backward(loss)
            slopes = [_slope(parameters[name], stacks[name]) for name in names]
            drop()
            inside = (raw.detach() >= 0) & (raw.detach() <= 1)
            raw.grad = torch.stack(slopes) * inside
            adam.step()
            progress(step + 1, settings.steps)
    chosen = raw.detach().clamp(0, 1)
    found = {name: chosen[place] for place, name in enumerate(names)}
    check_finite(COEFFICIENTS, found)
    return found


def entropy(scores: Tensor) -> Tensor:
    """The mean entropy of the predictions that scores give, in nats."""
    shares = scores.to(torch.promote_types(scores.dtype, torch.float32)).log_softmax(1)
    return -(shares.exp() * shares).sum(1).mean()


class _Stream:
    """Batches of one task's rows, in an order that is drawn anew in each pass."""

    def __init__(self, rows: int, settings: CoefficientSettings, number: int) -> None:
        self._rows = rows
        self._size = min(rows, settings.batch)
        self._generator = torch.Generator().manual_seed(settings.seed + number)
        self._left: list[int] = []

    def next_batch(self) -> list[int]:
        if len(self._left) < self._size:
            self._left += torch.randperm(self._rows, generator=self._generator).tolist()
        taken, self._left = self._left[: self._size], self._left[self._size :]
        return taken


def _stack(base: Checkpoint, vectors: Sequence[KeptVector], name: str) -> Tensor:
    """The task vectors of a tensor, flat, one behind the other; 0 where a member has none."""
    found = torch.zeros((len(vectors), base.info(name).numel))
    for row, vector in zip(found, vectors, strict=True):
        if name in vector:
            row.copy_(vector.difference(name).reshape(-1))
    return found


def _set_weights(
    parameters: Mapping[str, Tensor],
    befores: Mapping[str, Tensor],
    stacks: Mapping[str, Tensor],
    coefficients: Tensor,
) -> None:
    with torch.no_grad():
        for place, (name, stack) in enumerate(stacks.items()):
            change = coefficients[place].to(stack) @ stack
            parameters[name].copy_(befores[name] + change.view(befores[name].shape))


def _slope(live: Tensor, stack: Tensor) -> Tensor:
    """The derivative of the loss by a tensor's coefficients."""
    if live.grad is None:
        return torch.zeros(len(stack), dtype=torch.float64)
    return (stack @ live.grad.reshape(-1).float()).double().cpu()
