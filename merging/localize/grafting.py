"""Localization by grafting (Eq. 2; Panigrahi et al. 2023), which Localize-and-Stitch compares with.

It begins with the mask of the largest differences and learns where to leave it: the loss is taken
at W0 + gamma * tau with gamma = base (1 - sigmoid(S)) + (1 - base) sigmoid(S), one SGD step per
batch. The mask is gamma > 1/2; its density is where the passes end. It is the preset `grafting` of
`restitch.merging.localize.trained`, whose settings and batches it uses.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from restitch.merging.files.mask import Mask
from restitch.merging.localize.dataless import kept_count
from restitch.merging.localize.live_weights import LiveTensor, LiveWeights
from restitch.merging.ranking.score_tensors import check_finite, slope
from restitch.merging.ranking.top_k import top_k


class GraftingSettings(Protocol):
    """What it asks of the settings of a trained localizer."""

    @property
    def density(self) -> float:
        """Of the mask that it begins with."""

    @property
    def epochs(self) -> int:
        """Passes over the rows."""

    @property
    def learning_rate(self) -> float:
        """Of S."""

    @property
    def start(self) -> float:
        """S at the beginning, everywhere."""


class TrainingRun(Protocol):
    """The rows in batches, and what was seen on the way."""

    settings: Any
    steps: int

    def batches(self) -> Iterator[Any]:
        """One pass over the rows in a new order."""

    @property
    def backward(self) -> Callable[[Any], Tensor]:
        """Adds a batch's gradient to the live tensors; its loss."""

    def record(self, losses: Sequence[Tensor], kept: int, coordinates: int) -> None:
        """Note what a pass saw."""


def graft(live: LiveWeights, run: TrainingRun, scratch: Path | None) -> Mask:
    """The mask that the passes end with."""
    settings: GraftingSettings = run.settings
    kept = kept_count(settings.density, live.coordinates)
    largest = top_k(live.task_vector, kept, scratch=scratch)
    begun, scores = {}, {}
    for part in live.parts:
        base = torch.zeros_like(part.live, dtype=torch.bool)
        base.view(-1)[largest.coordinates(part.name).to(base.device)] = True
        begun[part.name] = base
        scores[part.name] = part.zeros().fill_(settings.start)
    for _ in range(settings.epochs):
        losses = []
        for batch in run.batches():
            for part in live.parts:
                _put(live, part, begun[part.name], scores[part.name])
            losses.append(run.backward(batch))
            for part in live.parts:
                base, score = begun[part.name], scores[part.name]
                pull = part.pull(live.buffer(part)).mul_(slope(score))
                pull = torch.where(base, -pull, pull)
                score.sub_(pull, alpha=settings.learning_rate)
            live.clear_gradients()
            run.steps += 1
        count = sum(int((begun[n] != (s > 0)).sum()) for n, s in scores.items())
        run.record(losses, count, live.coordinates)
    check_finite(scores)
    # gamma is above one half where S is positive outside of the mask or negative inside of it.
    return Mask.of(
        {n: (begun[n] != (s > 0)).view(-1).nonzero().view(-1).cpu() for n, s in scores.items()}
    )


def _put(live: LiveWeights, part: LiveTensor, base: Tensor, score: Tensor) -> None:
    gate = torch.sigmoid(score)
    gamma = torch.where(base, 1 - gate, gate)
    part.live.copy_(part.difference(live.buffer(part)).mul_(gamma).add_(part.base))
