"""What the localizers that keep one score per coordinate in memory have in common.

Scores are tensors by name in the shapes of the weights, on the device of the model. A threshold
is estimated from a sample that is always the same, so that a step costs no sort of the model.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from restitch.merging.errors import CannotJoin

_SAMPLE = 1 << 18


def fingerprint(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a repetition must share to find the same bytes."""
    on = torch.device(device)
    has_gpu = on.type == "cuda" and torch.cuda.is_available()
    kind = {"gpu": torch.cuda.get_device_name(on)} if has_gpu else {}
    return {
        "torch": torch.__version__,
        "device": on.type,
        **kind,
        "threads": torch.get_num_threads(),
    }


def slope(score: Tensor) -> Tensor:
    """The derivative of the sigmoid."""
    gate = torch.sigmoid(score)
    return gate.mul_(1 - gate)


def threshold_of(scores: Iterable[Tensor], kept: int, coordinates: int) -> float:
    """A value that about `kept` scores are above; exactly so many in a small model without ties.

    Args:
        scores: tensor by tensor; each is read before the next is asked for.
        kept: how many should be above.
        coordinates: how many scores there are.
    """
    sample = Sample(coordinates)
    return sample.threshold([sample.take(score) for score in scores], kept)


class Sample:
    """Every so manieth score of a model, whatever tensors it is cut into.

    The stride runs on from tensor to tensor, so that small ones get no more than their share.

    Args:
        coordinates: how many scores there are.
    """

    def __init__(self, coordinates: int) -> None:
        self._coordinates = coordinates
        self._stride = max(1, coordinates // _SAMPLE) | 1
        self._start = 0

    def next(self, count: int) -> slice:
        """Where the sample of the next tensor lies in it.

        Args:
            count: how many scores the tensor has.
        """
        start = self._start
        self._start = (start - count) % self._stride
        return slice(start, count, self._stride)

    def take(self, score: Tensor) -> Tensor:
        """The sample of the next tensor."""
        flat = score.view(-1)
        return flat[self.next(flat.numel())].clone()

    def threshold(self, pieces: Sequence[Tensor], kept: int) -> float:
        """A value that about `kept` of all scores are above, by their samples."""
        if not 0 < kept < self._coordinates:
            return math.inf if kept == 0 else -math.inf
        sample = torch.cat(list(pieces))
        above = min(max(1, round(kept / self._stride)), sample.numel() - 1)
        return float(torch.kthvalue(sample, sample.numel() - above).values)


def step_unit(score: float, pull: float) -> float:
    """The k-th largest score over the k-th largest pull; 1 where either has no such one."""
    usable = math.isfinite(score) and math.isfinite(pull) and score > 0 and pull > 0
    return score / pull if usable else 1.0


def check_finite(scores: Mapping[str, Tensor]) -> None:
    """Raise `CannotJoin` that names every tensor whose scores are no numbers."""
    bad = [name for name, score in scores.items() if not bool(torch.isfinite(score.sum()))]
    if bad:
        raise CannotJoin(
            "the scores are not finite after localizing",
            expected="a number for every coordinate",
            found=f"infinity or NaN in {len(bad)} tensors",
            hint="check the calibration rows, or localize with mode: dataless",
            details=bad,
        )
