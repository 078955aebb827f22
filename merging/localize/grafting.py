"""Localization by grafting (Eq. 2; Panigrahi et al. 2023), the baseline of Localize-and-Stitch.

It starts with the mask of the largest differences and learns where to deviate from it. The loss is
computed at W0 + gamma * tau with gamma = base (1 - sigmoid(S)) + (1 - base) sigmoid(S), with one
SGD step per batch. The mask is gamma > 1/2, whose density is not fixed. It is the preset `grafting`
of `trained`, whose settings and batches it uses.
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
    """The required settings of a trained localizer."""

    @property
    def density(self) -> float:
        """The density of the initial mask."""

    @property
    def epochs(self) -> int:
        """Passes over the rows."""

    @property
    def learning_rate(self) -> float:
        """The learning rate of S."""

    @property
    def start(self) -> float:
        """The initial value of S everywhere."""


class TrainingRun(Protocol):
    """The rows in batches, and the record of the passes."""

    settings: Any
    steps: int

    def batches(self) -> Iterator[Any]:
        """The batches of one pass over the rows, in a new order."""

    @property
    def backward(self) -> Callable[[Any], Tensor]:
        """Adds a batch's gradient to the live tensors and returns its loss."""

    def record(self, losses: Sequence[Tensor], kept: int, coordinates: int) -> None:
        """Record the losses and the number of kept coordinates of a pass."""


def graft(live: LiveWeights, run: TrainingRun, scratch: Path | None) -> Mask:
    """The mask after the last pass."""
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
                _interpolate(live, part, begun[part.name], scores[part.name])
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
    # gamma > 1/2 where S is positive outside of the initial mask, or negative inside of it.
    return Mask.of(
        {n: (begun[n] != (s > 0)).view(-1).nonzero().view(-1).cpu() for n, s in scores.items()}
    )


def _interpolate(live: LiveWeights, part: LiveTensor, base: Tensor, score: Tensor) -> None:
    gate = torch.sigmoid(score)
    gamma = torch.where(base, 1 - gate, gate)
    part.live.copy_(part.difference(live.buffer(part)).mul_(gamma).add_(part.base))
