"""Measurements of finetuned models, and the sentences that report them."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from restitch.registry.record import Interval, Record
from restitch.registry.specs.metric import METRICS, Metric

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ResultRef(Record):
    """One evaluation.

    Attributes:
        value: the task's metric; `low` and `high` are its 95 % interval.
        count: the number of rows.
        more: further values of the same rows by name; see `modeling.evaluation.Evaluation`.
        blob: the digest of the stored evaluation, with the outcome of every row.
    """

    metric: str
    value: float
    low: float
    high: float
    count: int
    more: dict[str, float] = Field(default_factory=dict)
    blob: Digest

    @property
    def measure(self) -> Metric:
        """The metric, with its direction."""
        return METRICS[self.metric]


class Gain(Record):
    """What a finetuned model has over the base on the rows of its own task.

    Attributes:
        verdict: `better` or `worse` if chance alone would rarely make the difference.
        difference: the finetuned model's value minus the base's.
        interval: its 95 % interval.
        p_value: the probability of such a difference without a real one.
    """

    verdict: Literal["better", "not better", "worse"]
    difference: float
    interval: Interval
    p_value: float


class Acceptance(Record):
    """A person's decision to switch off a check for one model."""

    reason: str
    by: str
    at: str


def compared(gain: Gain, results: Mapping[str, ResultRef]) -> str:
    """Both values and their difference, for a message."""
    base, finetuned = results["base"], results["finetuned"]
    return (
        f"{finetuned.metric} {finetuned.value:.3f}, the base has {base.value:.3f}:"
        f" {gain.difference:+.3f} (95 %: {gain.interval.low:+.3f} to {gain.interval.high:+.3f},"
        f" p = {gain.p_value:.2g}, {finetuned.count} rows)"
    )


def unexpected(expected: float | None, result: ResultRef | None) -> str | None:
    """A sentence if a finetuned model's value contradicts the one that its author measured."""
    if expected is None or result is None:
        return None
    # The ends of the interval are rounded.
    if result.low - 1e-9 <= expected <= result.high + 1e-9:
        return None
    return (
        f"its author measured {result.metric} {expected:.3f} (`expected` in the task file);"
        f" here it is {result.value:.3f} (95 %: {result.low:.3f} to {result.high:.3f},"
        f" {result.count} rows)"
    )


def decisions(accepted: Mapping[str, Acceptance]) -> str:
    """The decisions of people about a model, for a message."""
    return "; ".join(
        f"{check} accepted by {one.by}: {one.reason}" for check, one in accepted.items()
    )
