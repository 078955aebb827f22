"""Evaluate a model: the value of a metric with its 95 % interval, and the outcome of each row.

Evaluation is deterministic: evaluation mode, and the same batches every time. Among equal scores
the lower class ranks first, and a row with a NaN score counts as wrong. A score of minus infinity
stands for a choice that a row does not have. A row may have several right choices or answers.
`row_values` has the intervals.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from restitch.merging.errors import BadInput
from restitch.merging.prefetch import prefetch
from restitch.merging.progress import Progress
from restitch.modeling.data.exact_match import is_match
from restitch.modeling.data.rows import Rows
from restitch.modeling.families.family import Batch, Family, Preprocess
from restitch.modeling.heads import Head
from restitch.modeling.row_values import Bits, Classes, Errors, Losses, RowValues, rows_from_json
from restitch.registry.specs.head import GenerateSpec
from restitch.registry.specs.metric import METRICS, Metric

EVALUATOR_VERSION = 2
BATCH_SIZE = 64


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        value: the metric of all rows; `interval` is its 95 % interval.
        rows: the outcome of each row.
        more: further values of the same rows by name: `top5` is the share of rows whose class is
            among the first five, if there are more.
    """

    value: float
    interval: tuple[float, float]
    rows: RowValues
    more: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: RowValues, more: Mapping[str, float] | None = None) -> "Evaluation":
        """The evaluation with these outcomes."""
        return cls(rows.value(), rows.interval(), rows, more or {})

    @property
    def metric(self) -> Metric:
        """The metric."""
        return self.rows.metric

    @property
    def worth(self) -> float:
        """The value on a scale from 0 to 1, to average over tasks; see `Metric.worth`."""
        return self.metric.worth(self.value)

    @property
    def count(self) -> int:
        """The number of rows."""
        return self.rows.count

    def to_json(self) -> dict[str, Any]:
        """The evaluation as plain values."""
        return {
            "metric": self.metric.name,
            "value": self.value,
            "interval": list(self.interval),
            "count": self.count,
            "more": dict(self.more),
            "rows": self.rows.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Evaluation":
        """Read what `to_json` wrote."""
        low, high = data["interval"]
        rows = rows_from_json(data["metric"], data["rows"])
        return cls(data["value"], (low, high), rows, data["more"])


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
    of = METRICS[metric]
    # Labels are checked before anything is scored.
    targets = None if metric == "perplexity" else rows.targets
    head = head.to(next(model.parameters()).device)

    def scored(score: Callable[[Batch], NDArray[Any]]) -> NDArray[Any]:
        return by_row(model, rows, preprocess, score, batch_size, progress)

    if targets is None:
        losses = scored(lambda batch: family.text_losses(model, batch, head).double().cpu().numpy())
        return Evaluation.of(Losses.of(of, losses[:, 0], units_of(rows, head, losses[:, 1])))
    if metric == "exact_match":
        answers = rows.answers
        found = scored(lambda batch: np.array(family.generate(model, batch, head), dtype=object))
        spec = head.spec.generate or GenerateSpec()
        right = [
            any(is_match(text, answer, spec) for answer in own)
            for text, own in zip(found.tolist(), answers, strict=True)
        ]
        return Evaluation.of(Bits(of, np.array(right, dtype=np.bool_)))
    scores = scored(lambda batch: family.logits(model, batch, head).float().cpu().numpy())
    if metric == "squared_error":
        return Evaluation.of(Errors.of(of, np.square(scores[:, 0].astype(np.float64) - targets)))
    return summarize(scores, targets if rows.right is None else best(scores, rows.right), metric)


def best(scores: NDArray[np.float32], right: Sequence[tuple[int, ...]]) -> NDArray[np.int64]:
    """The right choice of each row with the highest score, of scores, [rows, choices].

    As in lm-eval, a row is right if any of its right choices has the highest score of all.
    """
    return np.array(
        [min(own, key=lambda one: (-row[one], one)) for row, own in zip(scores, right, strict=True)]
    )


def units_of(rows: Rows, head: Head, tokens: NDArray[Any]) -> NDArray[Any]:
    """How many units each text has, by which its loss is divided: tokens, words or bytes."""
    return tokens if head.spec.per is None else rows.text_lengths(head.spec.per)


def by_row(
    model: nn.Module,
    rows: Rows,
    preprocess: Preprocess,
    score: Callable[[Batch], NDArray[Any]],
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> NDArray[Any]:
    """What `score` makes of the batches of all rows, in the order of the rows."""
    where = next(model.parameters()).device
    model.eval()
    order = _order(rows)
    scores: NDArray[Any] | None = None
    done = 0
    with torch.inference_mode():
        for batch in _prepared(rows.select(order), preprocess, batch_size):
            part = score({name: tensor.to(where) for name, tensor in batch.items()})
            if scores is None:
                scores = np.empty((len(rows), *part.shape[1:]), dtype=part.dtype)
            scores[order[done : done + len(part)]] = part
            done += len(part)
            if progress is not None:
                progress(done, len(rows))
    assert scores is not None
    return scores


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
    """Evaluate scores, [rows, classes], against the classes of the rows by accuracy or F1."""
    count, classes = scores.shape
    own = scores[np.arange(count), targets][:, None]
    ahead = (scores > own) | ((scores == own) & (np.arange(classes) < targets[:, None]))
    usable = (np.isfinite(scores) | np.isneginf(scores)).all(1) & np.isfinite(own[:, 0])
    rank = np.where(usable, ahead.sum(1), classes)
    of = METRICS[metric]
    if metric == "f1":
        predicted = np.where(rank == classes, classes, np.nan_to_num(scores).argmax(1))
        return Evaluation.of(Classes(of, targets, predicted, classes))
    more = {"top5": float((rank < 5).mean())} if classes > 5 else {}
    return Evaluation.of(Bits(of, rank == 0), more)
