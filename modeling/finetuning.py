"""Finetune some weights of a live model on a task's rows, by the task's own loss.

AdamW with a linear rise and fall of the learning rate and clipped gradients. The model stays in
evaluation mode, without dropout, so the same rows, seed, device and threads give the same weights.
The caller restores the live tensors afterwards. Rows of similar length share a batch, to save
padding.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from restitch.merging.errors import BadInput
from restitch.merging.localize.live_weights import requiring_gradients
from restitch.merging.prefetch import prefetch
from restitch.merging.progress import Progress, ignore

VERSION = 1

# Rows are sorted by length within this many batches, or fewer if there are few rows: each pass
# should see different batches.
_SORTED_TOGETHER = 8

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class FinetuningSettings:
    """The settings of finetuning.

    Attributes:
        learning_rate: the highest learning rate, after the rise.
        rise: the share of all steps in which the learning rate grows.
        largest_gradient: the norm that gradients are clipped to, over all weights.
    """

    learning_rate: float
    epochs: int = 3
    batch_size: int = 16
    rise: float = 0.1
    weight_decay: float = 0.01
    largest_gradient: float = 1.0
    seed: int = 0

    @classmethod
    def of(cls, modality: Literal["text", "image"], *, seed: int = 0) -> "FinetuningSettings":
        """The usual settings for a kind of model: 5e-5 for text encoders, 1e-5 for CLIP."""
        return cls(5e-5 if modality == "text" else 1e-5, seed=seed)

    def to_json(self) -> dict[str, Any]:
        """Everything that determines the weights except for the model, the rows and the loss."""
        return asdict(self)


def finetune(
    parameters: Mapping[str, Tensor],
    names: Sequence[str],
    lengths: NDArray[np.int64],
    batch: Callable[[Sequence[int]], Batch],
    loss: Callable[[Batch], Tensor],
    settings: FinetuningSettings,
    *,
    progress: Progress = ignore,
) -> list[float]:
    """Train some tensors of a live model.

    Args:
        parameters: the live tensors of a loaded model, in evaluation mode.
        names: the tensors to train.
        lengths: the lengths of the rows, in any unit; all equal if they do not matter.
        batch: makes the batch of some rows, by their indices.
        loss: the mean loss of a batch at the model's current weights.
        settings: the settings.
        progress: steps done, of how many.

    Returns:
        The mean loss of each pass.

    Raises:
        BadInput: there are no rows, or the loss is not finite.
    """
    if len(lengths) == 0:
        raise BadInput("there are no rows to finetune on", expected="at least one labelled row")
    total = settings.epochs * math.ceil(len(lengths) / settings.batch_size)
    generator = torch.Generator().manual_seed(settings.seed)
    losses: list[float] = []
    done = 0
    with requiring_gradients(parameters, names) as drop:
        live = [parameters[name] for name in names]
        adam = torch.optim.AdamW(live, weight_decay=settings.weight_decay)
        for _ in range(settings.epochs):
            seen = []
            for made in prefetch(batch, _batches(lengths, settings.batch_size, generator)):
                with torch.enable_grad():
                    value = loss(made)
                    torch.autograd.backward(value)
                seen.append(value.detach())
                nn.utils.clip_grad_norm_(live, settings.largest_gradient)
                for group in adam.param_groups:
                    group["lr"] = settings.learning_rate * _share(done, total, settings.rise)
                adam.step()
                drop()
                done += 1
                progress(done, total)
            losses.append(_mean(seen, len(losses) + 1))
    return losses


def _share(step: int, steps: int, rise: float) -> float:
    """The share of the highest learning rate at a step, counted from 0: up, then down to zero."""
    up = max(1, round(rise * steps))
    return (step + 1) / up if step < up else (steps - step) / max(1, steps - up)


def _batches(
    lengths: NDArray[np.int64], size: int, generator: torch.Generator
) -> Iterator[list[int]]:
    """One pass over the rows in a new order, rows of similar length together."""
    order = torch.randperm(len(lengths), generator=generator).numpy()
    together = size * max(1, min(_SORTED_TOGETHER, len(lengths) // size // 4))
    batches: list[list[int]] = []
    for start in range(0, len(order), together):
        part = order[start : start + together]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[at : at + size].tolist() for at in range(0, len(part), size)]
    for place in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[place]


def _mean(losses: Sequence[Tensor], epoch: int) -> float:
    mean = float(torch.stack(list(losses)).double().mean())
    if not math.isfinite(mean):
        raise BadInput(
            "the loss is not finite while finetuning",
            expected="a number for every batch",
            found=f"{mean} in epoch {epoch}",
            hint="check the train rows of the task",
        )
    return mean
