"""Accuracy or F1 of a model on labelled rows, with a 95 % interval.

Evaluation is deterministic: evaluation mode, and the same batches every time. Among equal scores
the lower class ranks first, and a row with a NaN score counts as wrong. A score of minus infinity
stands for a choice that a row does not have. The interval of an accuracy is Wilson's; the interval
of an F1 comes from 1,000 seeded resamples of the confusion matrix.
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from restitch.merging.errors import BadInput
from restitch.merging.prefetch import prefetch
from restitch.merging.progress import Progress
from restitch.modeling.data.rows import Rows
from restitch.modeling.families.family import Batch, Family, Preprocess
from restitch.modeling.heads import Head
from restitch.modeling.significance import unpacked
from restitch.registry.specs.task import Metric

EVALUATOR_VERSION = 1
BATCH_SIZE = 64
METRICS: tuple[str, ...] = get_args(Metric)

_Z = 1.959963984540054  # the normal quantile of 0.975
_RESAMPLES = 1000


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        metric: accuracy, or f1: of class 1 if there are two classes, else the mean over classes.
        interval: its 95 % interval.
        top1: the share of rows whose class ranks first.
        top1_interval: Wilson's 95 % interval of top1; the same as `interval` for accuracy.
        top5: the share of rows whose class is among the first five; None below six classes.
        correct: one bit per row, most significant first: 1 if its class ranks first.
    """

    metric: str
    value: float
    interval: tuple[float, float]
    top1: float
    top1_interval: tuple[float, float]
    top5: float | None
    count: int
    correct: bytes

    def correct_rows(self) -> NDArray[np.bool_]:
        """One boolean per row: true if its class ranks first."""
        return unpacked(self.correct, self.count)

    def to_json(self) -> dict[str, Any]:
        """The evaluation as plain values."""
        values = asdict(self)
        values["interval"] = list(self.interval)
        values["top1_interval"] = list(self.top1_interval)
        values["correct"] = self.correct.hex()
        return values

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Evaluation":
        """Read what `to_json` wrote."""
        values = dict(data)
        for name in ("interval", "top1_interval"):
            values[name] = tuple(values[name])
        values["correct"] = bytes.fromhex(values["correct"])
        return cls(**values)


def evaluate(
    family: Family,
    model: nn.Module,
    head: Head,
    rows: Rows,
    preprocess: Preprocess,
    *,
    metric: str = "accuracy",
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> Evaluation:
    """Score a model, on its own device, on labelled rows; `progress` counts rows."""
    if metric not in METRICS:
        raise BadInput(f"unknown metric {metric!r}", expected=" or ".join(METRICS))
    targets = rows.targets
    where = next(model.parameters()).device
    head = head.to(where)
    model.eval()
    order = _order(rows)
    scores: NDArray[np.float32] | None = None
    done = 0
    with torch.inference_mode():
        for batch in _prepared(rows.select(order), preprocess, batch_size):
            on_device = {name: tensor.to(where) for name, tensor in batch.items()}
            part = family.logits(model, on_device, head).float().cpu().numpy()
            if scores is None:
                scores = np.empty((len(rows), part.shape[1]), dtype=np.float32)
            scores[order[done : done + len(part)]] = part
            done += len(part)
            if progress is not None:
                progress(done, len(rows))
    assert scores is not None
    return summarize(scores, targets, metric)


def _order(rows: Rows) -> NDArray[np.int64]:
    """The order of scoring: texts of similar length share a batch, to save padding."""
    if rows.modality == "image":
        return np.arange(len(rows))
    return np.argsort(rows.lengths(), kind="stable")


def _prepared(rows: Rows, preprocess: Preprocess, batch_size: int) -> Iterator[Batch]:
    """All batches in order, which threads prepare while the model works.

    Decoding and resizing release the interpreter, so images gain from several threads; a
    tokenizer must not be used by two.
    """
    threads = min(8, os.cpu_count() or 1) if rows.modality == "image" else 1

    def prepare(start: int) -> Batch:
        stop = min(start + batch_size, len(rows))
        return preprocess([rows[position] for position in range(start, stop)])

    yield from prefetch(prepare, range(0, len(rows), batch_size), threads=threads)


def summarize(scores: NDArray[np.float32], targets: NDArray[np.int64], metric: str) -> Evaluation:
    """Evaluate scores, [rows, classes], against the classes of the rows."""
    count, classes = scores.shape
    own = scores[np.arange(count), targets][:, None]
    ahead = (scores > own) | ((scores == own) & (np.arange(classes) < targets[:, None]))
    usable = (np.isfinite(scores) | np.isneginf(scores)).all(1) & np.isfinite(own[:, 0])
    rank = np.where(usable, ahead.sum(1), classes)
    correct = rank == 0
    top1 = float(correct.mean())
    top1_interval = wilson(int(correct.sum()), count)
    value, interval = top1, top1_interval
    if metric == "f1":
        predicted = np.where(rank == classes, classes, np.nan_to_num(scores).argmax(1))
        confusion = np.zeros((classes, classes + 1), dtype=np.int64)
        np.add.at(confusion, (targets, predicted), 1)
        value, interval = f1(confusion), _f1_interval(confusion)
    return Evaluation(
        metric=metric,
        value=value,
        interval=interval,
        top1=top1,
        top1_interval=top1_interval,
        top5=float((rank < 5).mean()) if classes > 5 else None,
        count=count,
        correct=np.packbits(correct).tobytes(),
    )


def wilson(successes: float, count: int) -> tuple[float, float]:
    """Compute Wilson's 95 % interval of a share."""
    share, square = successes / count, _Z * _Z
    centre = share + square / (2 * count)
    half = _Z * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    scale = 1 + square / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def f1(confusion: NDArray[np.int64]) -> float:
    """F1 of class 1 of two, or the mean over more classes; confusion is [class, predicted].

    A last column beyond the classes counts rows without a prediction. A class that neither
    occurs nor is predicted has F1 zero.
    """
    classes = len(confusion)
    hits = np.diagonal(confusion[:, :classes])
    total = confusion.sum(1) + confusion[:, :classes].sum(0)
    each = 2 * hits / np.maximum(total, 1)
    return float(each[1] if classes == 2 else each.mean())


def _f1_interval(confusion: NDArray[np.int64]) -> tuple[float, float]:
    random = np.random.default_rng(0)
    count = int(confusion.sum())
    drawn = random.multinomial(count, confusion.reshape(-1) / count, size=_RESAMPLES)
    values = [f1(sample.reshape(confusion.shape)) for sample in drawn]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
