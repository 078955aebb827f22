"""Localization with data: a mask that is learned with the task's own loss (Eq. 1).

The loss is computed at W0 + sigmoid(S) * tau, its gradient by S is grad_W * tau * sigmoid(S)
(1 - sigmoid(S)), and the mask is S > 0. The presets `paper` and `official` are the settings
of the paper and of its authors' code, and `grafting` is the paper's baseline (Eq. 2);
their density is not fixed. `budget` keeps exactly k coordinates: the loss is computed at the
hard mask of the k largest scores. Weights are computed from the checkpoints each time, so
rounding errors do not add up, and the base's are restored at the end. The same rows, seed and
`fingerprint` give the same mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from restitch.merging.errors import BadInput, unknown_name
from restitch.merging.files.mask import Mask
from restitch.merging.localize.dataless import kept_count
from restitch.merging.localize.live_weights import LiveTensor, LiveWeights
from restitch.merging.prefetch import prefetch
from restitch.merging.progress import Progress, ignore
from restitch.merging.ranking.score_tensors import (
    check_finite,
    finite_mean,
    slope,
    step_unit,
    threshold_of,
)
from restitch.merging.ranking.task_vector import TaskVector
from restitch.merging.ranking.top_k import TensorScores, top_k

NAME = "trained"
VERSION = 1
PRESETS = ("budget", "grafting", "official", "paper")

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class TrainedSettings:
    """The settings of learning; `of` makes them from a preset.

    Attributes:
        preset: one of `PRESETS`.
        density: the density of `budget`, and of the initial mask of `grafting`; the density of
            the other presets is not fixed.
        epochs: passes over the rows.
        seed: the seed of the order of the rows.
        batch_size: rows per batch.
        learning_rate: the learning rate of S; for `budget` the distance that scores move in all
            passes together, in units of the k-th largest.
        penalty: lambda in `paper`, l1 in `official`; not used by `budget`.
        start: the initial value of S on the coordinates of the largest differences.
        start_elsewhere: the initial value of S on all other coordinates.
        start_share: the fraction of the coordinates whose initial value is `start`.
    """

    preset: str = "budget"
    density: float = 0.01
    epochs: int = 10
    seed: int = 0
    batch_size: int = 16
    learning_rate: float = 1.0
    penalty: float = 0.0
    start: float = 0.0
    start_elsewhere: float = 0.0
    start_share: float = 0.0

    @classmethod
    def of(
        cls,
        preset: str = "budget",
        *,
        modality: Literal["text", "image"] = "text",
        density: float = 0.01,
        epochs: int = 10,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> TrainedSettings:
        """The settings of a preset for a kind of model.

        Args:
            preset: one of `PRESETS`.
            modality: the input of the model, on which the settings of `official` depend.
            density: the density of `budget`.
            epochs: passes over the rows.
            seed: the seed of the order of the rows.
            batch_size: rows per batch; None is the preset's own.
        """
        if preset not in PRESETS:
            raise unknown_name("preset", preset, PRESETS)
        own: dict[str, Any] = _PRESET_SETTINGS[preset]
        if preset == "official" and modality == "image":
            own = own | _OFFICIAL_IMAGE
        chosen = own if batch_size is None else own | {"batch_size": batch_size}
        return cls(preset=preset, density=density, epochs=epochs, seed=seed, **chosen)

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"{self.epochs} epochs with batches of {self.batch_size}")
        kept_count(self.density, 0)

    def to_json(self) -> dict[str, Any]:
        """Everything except the model, the rows and the loss that determines a mask."""
        return asdict(self)


_PRESET_SETTINGS: dict[str, dict[str, Any]] = {
    "budget": {"batch_size": 16, "learning_rate": 0.3},
    "grafting": {"batch_size": 16, "learning_rate": 1e7, "start": -5.0},
    "official": {
        "batch_size": 8,
        "learning_rate": 1e7,
        "penalty": 10.0,
        "start": 5.0,
        "start_elsewhere": -5.0,
        "start_share": 1e-5,
    },
    "paper": {
        "batch_size": 16,
        "learning_rate": 1e7,
        "penalty": 1e-5,
        "start": 3.0,
        "start_elsewhere": 0.0,
        "start_share": 0.01,
    },
}
_OFFICIAL_IMAGE = {"batch_size": 128, "penalty": 1.0}


@dataclass(frozen=True)
class Epoch:
    """One pass over the rows: the mean loss of its batches, and the density of the mask."""

    loss: float
    density: float


@dataclass(frozen=True)
class TrainedResult:
    """A learned mask.

    Attributes:
        mask: the kept coordinates.
        density: their share of all localizable coordinates.
        steps: the number of updates of the scores.
        history: one entry per pass.
        scores: the ranking of `budget`; None for the other presets.
    """

    mask: Mask
    density: float
    steps: int
    history: tuple[Epoch, ...]
    scores: TensorScores | None = None


def localize_trained(
    parameters: Mapping[str, Tensor],
    task_vector: TaskVector,
    rows: int,
    batch: Callable[[Sequence[int]], Batch],
    loss: Callable[[Batch], Tensor],
    settings: TrainedSettings,
    *,
    scratch: Path | None = None,
    progress: Progress | None = None,
) -> TrainedResult:
    """Learn the mask of one finetuned model.

    Args:
        parameters: the live tensors of the loaded base by their names in its checkpoint; only
            those of the task vector are written to, and the base's weights are restored at the
            end, also after an exception. The model should be in evaluation mode.
        task_vector: the task vector of the finetuned model.
        rows: the number of calibration rows.
        batch: makes the batch of some rows, by their indices; called once per batch.
        loss: the mean loss of a batch at the model's current weights.
        settings: the settings of learning.
        scratch: the folder for temporary files.
        progress: called with the batches done and the total.

    Raises:
        BadInput: no rows.
        CannotJoin: the loss or the scores are not finite.
    """
    if rows < 1:
        raise BadInput(
            "there are no rows to localize with",
            expected="at least one labelled row",
            found="none",
            hint="name a train split under data, or localize with mode: dataless",
        )
    run = _TrainingRun(rows, batch, loss, settings, progress or ignore)
    scores: TensorScores | None = None
    with LiveWeights(parameters, task_vector) as live:
        if settings.preset == "budget":
            scores = _budget(live, run)
            mask = top_k(scores, kept_count(settings.density, live.coordinates), scratch=scratch)
        else:
            train = {"grafting": _grafting, "official": _official, "paper": _paper}[settings.preset]
            mask = train(live, run, scratch)
    return TrainedResult(
        mask, mask.total / max(1, live.coordinates), run.steps, tuple(run.history), scores
    )


@dataclass
class _TrainingRun(Generic[Batch]):
    """The rows in batches, epoch by epoch, and the record of the passes."""

    rows: int
    batch: Callable[[Sequence[int]], Batch]
    loss: Callable[[Batch], Tensor]
    settings: TrainedSettings
    progress: Progress
    steps: int = 0
    seen: int = 0
    history: list[Epoch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.per_epoch = math.ceil(self.rows / self.settings.batch_size)
        self.generator = torch.Generator().manual_seed(self.settings.seed)

    def batches(self) -> Iterator[Batch]:
        """The batches of one pass over the rows, in a new order."""
        order = torch.randperm(self.rows, generator=self.generator).tolist()
        size = self.settings.batch_size
        chosen = (order[start : start + size] for start in range(0, len(order), size))
        for batch in prefetch(self.batch, chosen):
            yield batch
            self.seen += 1
            self.progress(self.seen, self.per_epoch * self.settings.epochs)

    def backward(self, batch: Batch) -> Tensor:
        """Add a batch's gradient to the live tensors, and return its loss."""
        with torch.enable_grad():
            value = self.loss(batch)
            torch.autograd.backward(value)
        return value.detach()

    def record(self, losses: Sequence[Tensor], kept: int, coordinates: int) -> None:
        """Record the losses and the number of kept coordinates of a pass."""
        mean = finite_mean("loss", losses, len(self.history) + 1)
        self.history.append(Epoch(mean, kept / max(1, coordinates)))


def _paper(live: LiveWeights, run: _TrainingRun[Any], scratch: Path | None) -> Mask:
    """One SGD step per batch on loss + penalty * sum sigmoid(S)."""
    settings = run.settings
    scores = _start(live, settings, scratch)

    def update(part: LiveTensor) -> None:
        score = scores[part.name]
        pull = part.pull(live.buffer(part)).add_(settings.penalty).mul_(slope(score))
        score.sub_(pull, alpha=settings.learning_rate)

    for _ in range(settings.epochs):
        losses = []
        for batch in run.batches():
            _interpolate(live, scores)
            losses.append(live.step(partial(run.backward, batch), update))
            run.steps += 1
        run.record(losses, _count_positive(scores), live.coordinates)
    return _positive(scores)


def _official(live: LiveWeights, run: _TrainingRun[Any], scratch: Path | None) -> Mask:
    """One step per epoch with the sum of the batches' gradients, and a push away from zero."""
    settings = run.settings
    scores = _start(live, settings, scratch)
    for _ in range(settings.epochs):
        _interpolate(live, scores)
        losses = [run.backward(batch) for batch in run.batches()]
        for part in live.parts:
            score = scores[part.name]
            steepness = slope(score)
            push = torch.sign(score).mul_(steepness).mul_(settings.penalty)
            pull = part.pull(live.buffer(part)).mul_(steepness)
            score.sub_(pull, alpha=settings.learning_rate)
            score.add_(push)
        live.clear_gradients()
        run.steps += 1
        run.record(losses, _count_positive(scores), live.coordinates)
    return _positive(scores)


def _grafting(live: LiveWeights, run: _TrainingRun[Any], scratch: Path | None) -> Mask:
    """Learn where to deviate from the mask of the largest differences (Panigrahi et al. 2023).

    The loss is computed at W0 + gamma * tau with gamma = base (1 - sigmoid(S)) + (1 - base)
    sigmoid(S), with one SGD step per batch. The mask is gamma > 1/2.
    """
    settings = run.settings
    begun = _largest(live, settings.density, scratch)
    scores = {part.name: part.zeros().fill_(settings.start) for part in live.parts}

    def update(part: LiveTensor) -> None:
        score = scores[part.name]
        pull = part.pull(live.buffer(part)).mul_(slope(score))
        pull = torch.where(begun[part.name], -pull, pull)
        score.sub_(pull, alpha=settings.learning_rate)

    for _ in range(settings.epochs):
        losses = []
        for batch in run.batches():
            for part in live.parts:
                gate = torch.sigmoid(scores[part.name])
                gamma = torch.where(begun[part.name], 1 - gate, gate)
                part.live.copy_(part.difference(live.buffer(part)).mul_(gamma).add_(part.base))
            losses.append(live.step(partial(run.backward, batch), update))
            run.steps += 1
        count = sum(int((begun[n] != (s > 0)).sum()) for n, s in scores.items())
        run.record(losses, count, live.coordinates)
    check_finite(scores)
    # gamma > 1/2 where S is positive outside of the initial mask, or negative inside of it.
    return _mask_where((n, begun[n] != (s > 0)) for n, s in scores.items())


def _budget(live: LiveWeights, run: _TrainingRun[Any]) -> TensorScores:
    """Straight-through training of a hard mask of the k largest scores.

    The first pass is at the base: the initial score is the root mean square of |gradient * tau|
    over the batches, a first-order estimate of the change in loss. Then each batch's loss is
    computed at the mask of the k largest scores, and -gradient * tau is added to the scores, also
    outside of the mask. The step size is scaled by the k-th largest score and the k-th largest
    pull, and divided by the number of passes. So the distance that the
    mask moves does not depend on the scale of the loss, of the differences or on that number.
    """
    settings = run.settings
    kept = kept_count(settings.density, live.coordinates)
    scores = _sensitivities(live, run, kept)
    size: float | None = None
    for _ in range(settings.epochs - 1):
        losses = []
        for batch in run.batches():
            threshold = threshold_of(scores.values(), kept, live.coordinates)
            live.graft(scores, threshold)
            backward = partial(run.backward, batch)
            if size is None:
                unit = step_unit(threshold, live.kth_pull(kept, backward))
                size = settings.learning_rate / (settings.epochs - 1) * unit
            update = partial(live.add_pull, scores, -size)
            losses.append(live.step(backward, update))
            run.steps += 1
        run.record(losses, kept, live.coordinates)
    check_finite(scores)
    return TensorScores({name: score.cpu() for name, score in scores.items()})


def _sensitivities(live: LiveWeights, run: _TrainingRun[Any], kept: int) -> dict[str, Tensor]:
    """The root mean square of |gradient * tau| over the batches of one pass at the base."""
    scores = {part.name: part.zeros() for part in live.parts}

    def add_square(part: LiveTensor) -> None:
        pull = part.pull(live.buffer(part))
        scores[part.name].addcmul_(pull, pull)

    losses = [live.step(partial(run.backward, batch), add_square) for batch in run.batches()]
    for score in scores.values():
        score.div_(run.per_epoch).sqrt_()
    run.record(losses, kept, live.coordinates)
    return scores


def _start(live: LiveWeights, settings: TrainedSettings, scratch: Path | None) -> dict[str, Tensor]:
    """The initial S: `start` where the differences are largest, else `start_elsewhere`."""
    largest = _largest(live, settings.start_share, scratch)
    scores = {part.name: part.zeros().fill_(settings.start_elsewhere) for part in live.parts}
    for name, score in scores.items():
        score.masked_fill_(largest[name], settings.start)
    return scores


def _largest(live: LiveWeights, share: float, scratch: Path | None) -> dict[str, Tensor]:
    """True at the largest differences, by tensor."""
    mask = top_k(live.task_vector, kept_count(share, live.coordinates), scratch=scratch)
    largest = {part.name: torch.zeros_like(part.live, dtype=torch.bool) for part in live.parts}
    for name, chosen in largest.items():
        chosen.view(-1)[mask.coordinates(name).to(chosen.device)] = True
    return largest


def _interpolate(live: LiveWeights, scores: Mapping[str, Tensor]) -> None:
    for part in live.parts:
        gate = torch.sigmoid(scores[part.name])
        part.live.copy_(part.difference(live.buffer(part)).mul_(gate).add_(part.base))


def _count_positive(scores: Mapping[str, Tensor]) -> int:
    return sum(int(torch.count_nonzero(score > 0)) for score in scores.values())


def _positive(scores: Mapping[str, Tensor]) -> Mask:
    check_finite(scores)
    return _mask_where((name, score > 0) for name, score in scores.items())


def _mask_where(chosen: Iterable[tuple[str, Tensor]]) -> Mask:
    return Mask.of({name: one.view(-1).nonzero().view(-1).cpu() for name, one in chosen})
