"""Localization by distillation: refine a mask until the grafted model predicts like the finetuned.

The initial scores are those of `fisher`. Then the loss of each batch is computed with the finetuned
values grafted at exactly the k highest scores. It is the divergence of the grafted model's class
probabilities from the finetuned model's, so it needs no labels. Minus gradient times difference is
added to all scores, also outside of the mask (straight through). The step size is scaled by the
k-th largest score and the k-th largest pull, and decreases to 0. If the density is not known yet,
every step uses another one of a range, so that one ranking is good at all of them. The same rows,
seed and fingerprint give the same scores.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from restitch.merging.localize.dataless import kept_count
from restitch.merging.localize.fisher import FisherSettings, Sensitivities, measure_sensitivities
from restitch.merging.localize.live_weights import LiveWeights
from restitch.merging.prefetch import prefetch
from restitch.merging.progress import Progress, ignore
from restitch.merging.ranking.score_tensors import (
    check_finite,
    finite_mean,
    step_unit,
    threshold_of,
)
from restitch.merging.ranking.task_vector import TaskVector
from restitch.merging.ranking.top_k import TensorScores

NAME = "distilled"
VERSION = 1

_TARGET_ROWS = 32

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class DistilledSettings:
    """The settings of the refinement.

    Attributes:
        lowest: the lowest density of a step.
        highest: the highest density of a step; equal to `lowest` if the density is known.
        epochs: passes over the rows after the one for the sensitivities.
        seed: the seed of the order of the rows and of the densities.
        batch_size: rows per step.
        learning_rate: the step size, in units of the k-th largest score over the square root of
            the number of steps.
        fisher: the settings of the initial scores.
    """

    lowest: float
    highest: float
    epochs: int = 3
    seed: int = 0
    batch_size: int = 16
    learning_rate: float = 0.3
    fisher: FisherSettings = field(default_factory=FisherSettings)

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or not 0 < self.lowest <= self.highest:
            raise ValueError(f"bad settings: {self}")
        kept_count(self.highest, 0)

    def to_json(self) -> dict[str, Any]:
        """Everything except the model, the rows and the logits that determines the scores."""
        return asdict(self)


@dataclass(frozen=True)
class DistilledResult:
    """A refined ranking.

    Attributes:
        scores: the scores of all coordinates.
        sensitivities: the importance of the coordinates to the model.
        losses: the mean divergence of each pass.
    """

    scores: TensorScores
    sensitivities: Sensitivities
    losses: tuple[float, ...]


def localize_distilled(
    parameters: Mapping[str, Tensor],
    task_vector: TaskVector,
    rows: int,
    batch: Callable[[Sequence[int]], Batch],
    logits: Callable[[Batch], Tensor],
    settings: DistilledSettings,
    *,
    progress: Progress | None = None,
) -> DistilledResult:
    """Refine the ranking of one finetuned model, with the arguments of `localize_fisher`."""
    report = _Counted(progress or ignore, rows, settings)
    with LiveWeights(parameters, task_vector) as live:
        found = measure_sensitivities(live, rows, batch, logits, settings.fisher, report.within)
        report.next(min(rows, settings.fisher.most_rows))
        targets = _targets(live, rows, batch, logits, report)
        scores = {}
        for part in live.parts:
            importance = found.spread(part.name, settings.fisher.power, part.live.shape)
            score = part.zeros()
            size = part.difference(live.buffer(part)).abs_()
            scores[part.name] = score.copy_(importance).mul_(size)
        losses = _refine(live, scores, targets, batch, logits, settings, report)
    check_finite(scores)
    return DistilledResult(
        TensorScores({name: score.cpu() for name, score in scores.items()}), found, tuple(losses)
    )


def _targets(
    live: LiveWeights,
    rows: int,
    batch: Callable[[Sequence[int]], Batch],
    logits: Callable[[Batch], Tensor],
    report: "_Counted",
) -> Tensor:
    """The predictions of the model with all localizable weights finetuned, by row."""
    live.interpolate(1.0)
    found = []
    starts = range(0, rows, _TARGET_ROWS)
    for made in prefetch(batch, (range(at, min(at + _TARGET_ROWS, rows)) for at in starts)):
        found.append(_predicted(logits(made)))
        report.next(len(found[-1]))
    return torch.cat(found)


def _refine(
    live: LiveWeights,
    scores: dict[str, Tensor],
    targets: Tensor,
    batch: Callable[[Sequence[int]], Batch],
    logits: Callable[[Batch], Tensor],
    settings: DistilledSettings,
    report: "_Counted",
) -> list[float]:
    steps = settings.epochs * math.ceil(len(targets) / settings.batch_size)
    densities = _densities(settings, steps)
    generator = torch.Generator().manual_seed(settings.seed)

    def backward(made: Any, chosen: Tensor) -> Tensor:
        """Compute the gradients of a batch's divergence from the targets, and return it."""
        with torch.enable_grad():
            actual = _predicted(logits(made))
            target = targets[chosen.to(targets.device)]
            loss = _divergence(target, actual).mean()
            torch.autograd.backward(loss)
        return loss.detach()

    unit: float | None = None
    losses: list[float] = []
    step = 0
    for _ in range(settings.epochs):
        order = torch.randperm(len(targets), generator=generator)
        chosen = torch.split(order, settings.batch_size)
        seen = []
        for made, rows in zip(
            prefetch(batch, (one.tolist() for one in chosen)), chosen, strict=True
        ):
            kept = max(1, kept_count(densities[step], live.coordinates))
            threshold = threshold_of(scores.values(), kept, live.coordinates)
            live.graft(scores, threshold)
            if unit is None:
                pull = live.kth_pull(kept, partial(backward, made, rows))
                unit = step_unit(threshold, pull)
            size = settings.learning_rate * unit * (1 - step / steps) / math.sqrt(steps)
            with live.consuming_gradients(partial(live.add_pull, scores, -size)):
                seen.append(backward(made, rows))
            step += 1
            report.next(len(rows))
        losses.append(finite_mean("divergence", seen, len(losses) + 1))
    return losses


def _predicted(scores: Tensor) -> Tensor:
    """The log probabilities of the classes; a single score is the mean of a Gaussian."""
    return scores if scores.shape[-1] == 1 else scores.log_softmax(-1)


def _divergence(target: Tensor, actual: Tensor) -> Tensor:
    """The divergence of each prediction from its target; Gaussians have unit variance."""
    if target.shape[-1] == 1:
        return (target - actual).square().sum(-1) / 2
    return (target.exp() * (target - actual)).sum(-1)


def _densities(settings: DistilledSettings, steps: int) -> list[float]:
    """The density of each step: spaced evenly in the logarithm, in a seeded order."""
    if settings.lowest == settings.highest:
        return [settings.highest] * steps
    shares = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    order = torch.randperm(steps, generator=torch.Generator().manual_seed(settings.seed))
    ratio = settings.highest / settings.lowest
    return [settings.lowest * ratio ** float(shares[place]) for place in order.tolist()]


class _Counted:
    """Progress over all passes: sensitivities, targets, refinement."""

    def __init__(self, progress: Progress, rows: int, settings: DistilledSettings) -> None:
        self._progress = progress
        self._total = min(rows, settings.fisher.most_rows) + (1 + settings.epochs) * rows
        self._done = 0

    def within(self, done: int, _: int) -> None:
        self._progress(self._done + done, self._total)

    def next(self, rows: int) -> None:
        self._done += rows
        self._progress(self._done, self._total)
