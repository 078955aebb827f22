"""Localization by distillation: a mask that is refined until the graft says what the model says.

Scores begin as those of `restitch.merging.localize.fisher`. Then each batch's loss is taken with exactly
the k highest scores grafted: the divergence of the graft's class probabilities from the finetuned
model's own, so that no labels are needed and what is preserved is what grafting should preserve.
Its -gradient x difference is added to all scores, also to those outside of the mask (straight
through). Steps are measured by the k-th largest score and the k-th largest pull and become smaller
to the end. Where the density is not known yet, every step is taken at another one of a range, so
that one ranking is good at all of them. The same rows, seed and fingerprint give the same scores.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from restitch.merging.errors import CannotJoin
from restitch.merging.localize.dataless import kept_count
from restitch.merging.localize.fisher import FisherSettings, Sensitivities, measure_sensitivities
from restitch.merging.localize.live_weights import LiveTensor, LiveWeights
from restitch.merging.prefetch import prefetch
from restitch.merging.progress import Progress, ignore
from restitch.merging.ranking.score_tensors import Sample, check_finite, step_unit, threshold_of
from restitch.merging.ranking.task_vector import TaskVector
from restitch.merging.ranking.top_k import TensorScores

NAME = "distilled"
VERSION = 1

_TARGET_ROWS = 32

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class DistilledSettings:
    """How a mask is refined.

    Attributes:
        lowest: the lowest density that a step is taken at.
        highest: the highest; the same where the density is known.
        epochs: passes over the rows after the one for the sensitivities.
        seed: of the order of the rows and of the densities.
        batch_size: rows per step.
        learning_rate: how far scores move, in units of the k-th largest and of the square root
            of the number of steps.
        fisher: how the scores begin.
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
            raise ValueError(f"{self} cannot be followed")
        kept_count(self.highest, 0)

    def to_json(self) -> dict[str, Any]:
        """Everything that determines the scores beside the model, the rows and the logits."""
        return asdict(self)


@dataclass(frozen=True)
class DistilledResult:
    """A refined ranking.

    Attributes:
        scores: of all coordinates.
        sensitivities: what the coordinates are worth to the model.
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
    """Refine the ranking of one finetuned model.

    Args:
        parameters: the live tensors of the loaded base by their names in its checkpoint; they
            hold the base's weights again afterwards. The model should be in evaluation mode.
        task_vector: what finetuning changed.
        rows: how many calibration rows there are; labels are not looked at.
        batch: makes the batch of some rows, by their indices.
        logits: the scores of the classes at the model's current weights, [rows, classes].
        settings: how.
        progress: called with the rows gone through and the rows in all.

    Raises:
        BadInput: no rows.
        CannotJoin: the model's scores or gradients are not finite.
    """
    report = _Counted(progress or ignore, rows, settings)
    with LiveWeights(parameters, task_vector) as live:
        found = measure_sensitivities(live, rows, batch, logits, settings.fisher, report.within)
        report.next(min(rows, settings.fisher.most_rows))
        targets = _targets(live, rows, batch, logits, report)
        scores = {}
        for part in live.parts:
            worth = found.spread(part.name, settings.fisher.power, part.live.shape)
            score = part.zeros()
            size = part.difference(live.buffer(part)).abs_()
            scores[part.name] = score.copy_(worth).mul_(size)
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
    """What the finetuned model says of each row, with all that masks can hold of it."""
    live.interpolate(1.0)
    found = []
    starts = range(0, rows, _TARGET_ROWS)
    for made in prefetch(batch, (range(at, min(at + _TARGET_ROWS, rows)) for at in starts)):
        found.append(logits(made).log_softmax(1))
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
        """The gradients of a batch's divergence from what the finetuned model says."""
        with torch.enable_grad():
            found = logits(made).log_softmax(1)
            wanted = targets[chosen.to(targets.device)]
            loss = (wanted.exp() * (wanted - found)).sum(1).mean()
            torch.autograd.backward(loss)
        return loss.detach()

    unit: float | None = None
    losses, step = [], 0
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
                pull = _kth_pull(live, kept, partial(backward, made, rows))
                unit = step_unit(threshold, pull)
            size = settings.learning_rate * unit * (1 - step / steps) / math.sqrt(steps)
            with live.consuming_gradients(partial(_move, live, scores, -size)):
                seen.append(backward(made, rows))
            step += 1
            report.next(len(rows))
        losses.append(_mean(seen))
    return losses


def _move(live: LiveWeights, scores: Mapping[str, Tensor], share: float, part: LiveTensor) -> None:
    part.add_pull(scores[part.name], live.buffer(part), share)


def _kth_pull(live: LiveWeights, kept: int, backward: Callable[[], Tensor]) -> float:
    """The k-th largest pull of a backward pass, of which no two gradients are kept at a time."""
    sample = Sample(live.coordinates)
    places = {part.name: sample.next(part.live.numel()) for part in live.parts}
    pieces = {part.name: part.zeros().view(-1)[places[part.name]].clone() for part in live.parts}

    def look(part: LiveTensor) -> None:
        pull = part.pull(live.buffer(part)).abs_()
        pieces[part.name] = pull.view(-1)[places[part.name]].clone()

    with live.consuming_gradients(look):
        backward()
    return sample.threshold([pieces[part.name] for part in live.parts], kept)


def _densities(settings: DistilledSettings, steps: int) -> list[float]:
    """The density of each step: from a range, evenly in the logarithm and in a seeded order."""
    if settings.lowest == settings.highest:
        return [settings.highest] * steps
    shares = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    order = torch.randperm(steps, generator=torch.Generator().manual_seed(settings.seed))
    ratio = settings.highest / settings.lowest
    return [settings.lowest * ratio ** float(shares[place]) for place in order.tolist()]


def _mean(losses: Sequence[Tensor]) -> float:
    mean = float(torch.stack(list(losses)).double().mean())
    if not math.isfinite(mean):
        raise CannotJoin(
            "the divergence is not finite while localizing",
            expected="a number for every batch",
            found=str(mean),
            hint="check the calibration rows, or localize with mode: dataless",
        )
    return mean


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
