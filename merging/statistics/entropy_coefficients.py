"""One coefficient per task and tensor, learned by minimizing the entropy of the predictions.

Layer-wise AdaMerging (Yang et al., ICLR 2024): W_l = W0_l + sum_t lambda_tl * tau_tl, where the
lambdas minimize the sum over tasks of the mean entropy of the merged model's predictions on
unlabelled rows, by Adam. They are clamped to 0 to 1 as in the authors' code. Gradients of the
weights are computed through the live model and projected on the task vectors. Memory holds the
task vectors in float32: one model's size for each task.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.localize.live_weights import requiring_gradients
from restitch.merging.order import by_bytes
from restitch.merging.progress import Progress, ignore
from restitch.merging.ranking.member_vector import MemberVector
from restitch.merging.statistics.statistic_file import COEFFICIENTS, check_finite

VERSION = 1


@dataclass(frozen=True)
class CoefficientSettings:
    """The settings of learning.

    Attributes:
        steps: the number of steps of Adam; each uses one batch of every task.
        learning_rate: the learning rate of Adam.
        start: the initial value of all coefficients.
        batch: rows per batch.
        seed: the seed of the order of the rows.
    """

    steps: int
    learning_rate: float
    start: float
    batch: int
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Everything except weights and rows that determines the coefficients."""
        return asdict(self)


def learn_coefficients(
    parameters: Mapping[str, Tensor],
    base: Checkpoint,
    vectors: Sequence[MemberVector],
    rows: Sequence[int],
    logits: Callable[[int, Sequence[int]], Tensor],
    settings: CoefficientSettings,
    *,
    progress: Progress = ignore,
) -> dict[str, Tensor]:
    """Learn the coefficients of each tensor: float64, in the order of the vectors.

    Args:
        parameters: the live tensors of the loaded base; their weights are overwritten, and the
            caller restores them.
        base: the base's checkpoint.
        vectors: the task vectors.
        rows: the number of rows of each task.
        logits: the scores at the live weights, by task number and row indices.
        settings: the settings of learning.
        progress: called with the steps done and the total.

    Raises:
        BadInput: a task has no rows, or a coefficient is not finite.
    """
    if min(rows, default=0) < 1:
        raise BadInput("there are no rows to learn coefficients on", expected="rows of every task")
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
    coefficients = {name: chosen[place] for place, name in enumerate(names)}
    check_finite(COEFFICIENTS, coefficients)
    return coefficients


def entropy(scores: Tensor) -> Tensor:
    """The mean entropy of the predictions for some scores, in nats."""
    shares = scores.to(torch.promote_types(scores.dtype, torch.float32)).log_softmax(-1)
    return -(shares.exp() * shares).sum(-1).mean()


class _Stream:
    """Batches of one task's rows, in a new random order in each pass."""

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


def _stack(base: Checkpoint, vectors: Sequence[MemberVector], name: str) -> Tensor:
    """The flat task vectors of a tensor as rows; 0 if a member does not have the tensor."""
    stack = torch.zeros((len(vectors), base.info(name).numel))
    for row, vector in zip(stack, vectors, strict=True):
        if name in vector:
            row.copy_(vector.difference(name).reshape(-1))
    return stack


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
