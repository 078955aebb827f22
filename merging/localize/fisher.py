"""Localization by sensitivity: one pass over inputs without labels, and one score per coordinate.

To the second order, dropping a coordinate costs its squared difference times its entry on the
diagonal of the Fisher matrix: the mean squared gradient of log p(y|x), with y sampled from the
model itself, so no labels are needed. Entries are noisy if there are few rows, so each is replaced
by the product of its row's and its column's means (as in Adafactor), which ranks as well
(docs/log.md). So only one factor per row and per column is stored: scores are streamed from the
checkpoints, a gradient is dropped as soon as it is added, and no further array of the model's size
is allocated. The gradients are computed half-way between base and finetuned.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from restitch.merging.errors import BadInput, CannotJoin
from restitch.merging.files.sparse_layout import rows_and_columns
from restitch.merging.localize.live_weights import LiveWeights
from restitch.merging.prefetch import prefetch
from restitch.merging.progress import Progress, ignore
from restitch.merging.ranking.task_vector import TaskVector
from restitch.merging.ranking.top_k import strided_positions

NAME = "fisher"
VERSION = 1

# The smallest entry as a share of the mean: without it, coordinates that no calibration row
# depends on could not be ranked by their difference.
_FLOOR = 1e-6
_SMALLEST, _LARGEST = 1e-30, 1e30  # limits of a factor: positive and finite in bfloat16

Batch = TypeVar("Batch")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class FisherSettings:
    """The settings of the measurement of sensitivities.

    Attributes:
        at: the point between base (0) and finetuned (1) where the gradients are computed.
        power: the exponent of a Fisher entry in a score; one half is the second-order estimate,
            a smaller one gives the difference more weight.
        most_rows: the largest number of rows to use.
        batch_size: rows per backward pass; their gradients are summed before they are squared.
        seed: the seed of the order of the rows and of the sampled labels.
    """

    at: float = 0.5
    power: float = 0.25
    most_rows: int = 128
    batch_size: int = 4
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Everything except the model, the rows and the logits that determines the scores."""
        return asdict(self)


class Sensitivities:
    """The Fisher diagonal, as one factor per row and one per column of each tensor."""

    def __init__(self, factors: Mapping[str, tuple[Floats, Floats]]) -> None:
        self._factors = dict(factors)

    def factors(self, name: str, power: float) -> tuple[Floats, Floats]:
        """Row and column factors, whose products are the entries to that power."""
        rows, columns = self._factors[name]
        return rows**power, columns**power

    def to_factors(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The `SparseTensor.factors` of tensors for a sparse delta."""
        result = {}
        for name in names:
            both = np.concatenate(self.factors(name, 1.0)).clip(_SMALLEST, _LARGEST)
            result[name] = torch.from_numpy(both).to(torch.bfloat16)
        return result

    def spread(self, name: str, power: float, shape: torch.Size) -> Tensor:
        """All entries of a tensor to that power, in float64 and in its shape."""
        rows, columns = self.factors(name, power)
        return torch.from_numpy(np.outer(rows, columns)).view(shape)


class FisherScores:
    """|task vector| times the sensitivity to a power, streamed; see `top_k.Scores`."""

    floor = 0.0

    def __init__(self, task_vector: TaskVector, sensitivities: Sensitivities, power: float) -> None:
        self.names = task_vector.names
        self.numel = task_vector.numel
        self.score_dtype = task_vector.score_dtype
        self._vector = task_vector
        self._sensitivities = sensitivities
        self._power = power

    def chunks(self, name: str, start: int = 0) -> Iterator[Tensor]:
        """The scores of a tensor from a position on; a chunk is valid until the next one."""
        for chunk in self._vector.chunks(name, start):
            self._weigh(name, chunk, np.arange(start, start + chunk.numel()))
            start += chunk.numel()
            yield chunk

    def sample(self, name: str, stride: int, block: int) -> Tensor:
        """The first `block` of every `stride` scores."""
        sample = self._vector.sample(name, stride, block)
        positions = strided_positions(self.numel(name), stride, block)
        self._weigh(name, sample, positions.numpy())
        return sample

    def _weigh(self, name: str, scores: Tensor, positions: NDArray[np.int64]) -> None:
        rows, columns = self._sensitivities.factors(name, self._power)
        row, column = np.divmod(positions, len(columns))
        array = scores.numpy()
        array *= (rows[row] * columns[column]).astype(array.dtype)


def localize_fisher(
    parameters: Mapping[str, Tensor],
    task_vector: TaskVector,
    rows: int,
    batch: Callable[[Sequence[int]], Batch],
    logits: Callable[[Batch], Tensor],
    settings: FisherSettings,
    *,
    progress: Progress | None = None,
) -> tuple[FisherScores, Sensitivities]:
    """The scores of all coordinates, and their sensitivities.

    Args:
        parameters: the live tensors of the loaded base by their names in its checkpoint; the
            base's weights are restored at the end. The model should be in evaluation mode.
        task_vector: the task vector of the finetuned model.
        rows: the number of calibration rows; labels are not used.
        batch: makes the batch of some rows, by their indices.
        logits: the scores of the classes at the model's current weights, [rows, classes], or
            [rows, positions, classes]; of one class for a number.
        settings: the settings of the measurement.
        progress: called with the rows done and the total.

    Raises:
        BadInput: no rows.
        CannotJoin: the model's scores or gradients are not finite.
    """
    with LiveWeights(parameters, task_vector) as live:
        measured = measure_sensitivities(live, rows, batch, logits, settings, progress or ignore)
    return FisherScores(task_vector, measured, settings.power), measured


def measure_sensitivities(
    live: LiveWeights,
    rows: int,
    batch: Callable[[Sequence[int]], Batch],
    logits: Callable[[Batch], Tensor],
    settings: FisherSettings,
    progress: Progress,
) -> Sensitivities:
    """Measure the sensitivities at `settings.at`, with the arguments of `localize_fisher`."""
    if rows < 1:
        raise BadInput(
            "there are no rows to localize with",
            expected="at least one row",
            found="none",
            hint="name a train split under data, or localize with mode: dataless",
        )
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(rows, generator=generator).tolist()[: settings.most_rows]
    sums = {part.name: _zeros(part.live) for part in live.parts}
    live.interpolate(settings.at)
    size = settings.batch_size
    chosen = [order[start : start + size] for start in range(0, len(order), size)]
    done = 0
    with live.consuming_gradients(lambda part: _add_squares(sums[part.name], part.live)):
        for made in prefetch(batch, chosen):
            with torch.enable_grad():
                scores = logits(made)
                torch.autograd.backward(sampled_loss(scores, generator))
            done += len(scores)
            progress(done, len(order))
    return Sensitivities(_factored(sums, len(order)))


def sampled_loss(scores: Tensor, generator: torch.Generator) -> Tensor:
    """The summed cross-entropy of all predictions, each with a class sampled from it.

    A single score is the mean of a Gaussian with unit variance, from which a number is sampled.
    """
    each = scores.flatten(0, -2)
    if each.shape[1] == 1:
        noise = torch.randn(each.shape, generator=generator).to(each)
        return F.mse_loss(each, each.detach() + noise, reduction="sum") / 2
    target = sample_classes(each.detach(), generator)
    return F.cross_entropy(each, target, reduction="sum")


def sample_classes(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Sample a class for each row, on the CPU: equal scores give equal classes on any device."""
    shares = scores.double().cpu().softmax(1)
    if not bool(torch.isfinite(shares).all()):
        raise CannotJoin(
            "the model's scores are not finite",
            expected="a finite score for every class",
            found="NaN or infinity",
            hint="check the calibration rows, or localize with mode: dataless",
        )
    return torch.multinomial(shares, 1, generator=generator).view(-1).to(scores.device)


def _zeros(live: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = rows_and_columns(tuple(live.shape))
    zeros = partial(torch.zeros, dtype=torch.float64, device=live.device)
    return zeros(rows), zeros(columns)


def _add_squares(sums: tuple[Tensor, Tensor], live: Tensor) -> None:
    """Add the squares of a gradient to the sums of rows and columns; overwrites the gradient."""
    assert live.grad is not None
    squares = live.grad.reshape(len(sums[0]), len(sums[1])).square_()
    sums[0].add_(squares.sum(1, dtype=torch.float64))
    sums[1].add_(squares.sum(0, dtype=torch.float64))


def _factored(
    sums: Mapping[str, tuple[Tensor, Tensor]], rows: int
) -> dict[str, tuple[Floats, Floats]]:
    """Factors of row sum times column sum over the whole sum, per row of data, with a floor."""
    means = {name: (one.cpu() / rows, two.cpu() / rows) for name, (one, two) in sums.items()}
    coordinates = sum(one.numel() * two.numel() for one, two in means.values())
    mean = sum(float(one.sum()) for one, _ in means.values()) / max(coordinates, 1)
    if not np.isfinite(mean):
        raise CannotJoin(
            "the gradients are not finite while localizing",
            expected="a finite gradient for every weight",
            found=str(mean),
            hint="check the calibration rows, or localize with mode: dataless",
        )
    floor = _FLOOR * mean if mean > 0 else 1.0
    result = {}
    for name, (one, two) in means.items():
        of_rows = one.numpy() + floor * len(two)
        of_columns = two.numpy() + floor * len(one)
        result[name] = (of_rows, of_columns / (of_rows.sum() or 1.0))
    return result
