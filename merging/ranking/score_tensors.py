"""Shared code of the localizers that keep one score per coordinate in memory.

Scores are tensors by name in the shapes of the weights, on the device of the model. A threshold
is estimated from a fixed sample, so that a step does not sort the scores of the whole model.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from restitch.merging.errors import CannotJoin

_SAMPLE = 1 << 18


def fingerprint(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The environment that must be equal to reproduce the same bytes."""
    on = torch.device(device)
    has_gpu = on.type == "cuda" and torch.cuda.is_available()
    kind = {"gpu": torch.cuda.get_device_name(on)} if has_gpu else {}
    threads = torch.get_num_threads()
    return {"torch": torch.__version__, "device": on.type, **kind, "threads": threads}


def slope(score: Tensor) -> Tensor:
    """The derivative of the sigmoid."""
    gate = torch.sigmoid(score)
    return gate.mul_(1 - gate)


def threshold_of(scores: Iterable[Tensor], kept: int, coordinates: int) -> float:
    """A threshold that about `kept` scores exceed; exactly `kept` in a small model without ties.

    Args:
        scores: tensor by tensor; each is read before the next one is requested.
        kept: the number of scores above the threshold.
        coordinates: the number of all scores.
    """
    sample = Sample(coordinates)
    return sample.threshold([sample.take(score) for score in scores], kept)


class Sample:
    """A sample of a model's scores with a fixed stride.

    The stride continues from tensor to tensor, so that small tensors are not overrepresented.
    """

    def __init__(self, coordinates: int) -> None:
        self._coordinates = coordinates
        self._stride = max(1, coordinates // _SAMPLE) | 1
        self._start = 0

    def next(self, count: int) -> slice:
        """The slice of the next tensor, with `count` scores, that belongs to the sample."""
        start = self._start
        self._start = (start - count) % self._stride
        return slice(start, count, self._stride)

    def take(self, score: Tensor) -> Tensor:
        """The sample of the next tensor."""
        flat = score.view(-1)
        return flat[self.next(flat.numel())].clone()

    def threshold(self, pieces: Sequence[Tensor], kept: int) -> float:
        """The threshold that about `kept` of all scores exceed, estimated from the samples."""
        if not 0 < kept < self._coordinates:
            return math.inf if kept == 0 else -math.inf
        # A large model lies on several devices.
        sample = torch.cat([piece.to(pieces[0].device) for piece in pieces])
        above = min(max(1, round(kept / self._stride)), sample.numel() - 1)
        return float(torch.kthvalue(sample, sample.numel() - above).values)


def step_unit(score: float, pull: float) -> float:
    """The k-th largest score over the k-th largest pull; 1 if either is not positive and finite."""
    usable = math.isfinite(score) and math.isfinite(pull) and score > 0 and pull > 0
    return score / pull if usable else 1.0


def finite_mean(name: str, losses: Sequence[Tensor], epoch: int) -> float:
    """The mean of the losses of an epoch; raises `CannotJoin` if it is not finite."""
    mean = float(torch.stack(list(losses)).double().mean())
    if not math.isfinite(mean):
        raise CannotJoin(
            f"the {name} is not finite while localizing",
            expected=f"a finite {name} for every batch",
            found=f"{mean} in epoch {epoch}",
            hint="check the calibration rows, or localize with mode: dataless",
        )
    return mean


def check_finite(scores: Mapping[str, Tensor]) -> None:
    """Raise `CannotJoin` with the names of all tensors whose scores are not finite."""
    bad = [name for name, score in scores.items() if not bool(torch.isfinite(score.sum()))]
    if bad:
        raise CannotJoin(
            "the scores are not finite after localizing",
            expected="a finite score for every coordinate",
            found=f"infinity or NaN in {len(bad)} tensors",
            hint="check the calibration rows, or localize with mode: dataless",
            details=bad,
        )
