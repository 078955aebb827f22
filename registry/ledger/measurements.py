"""Measurements of finetuned models, and the sentences that report them."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

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

    @property
    def against_base(self) -> str:
        """The verdict in words, with its statistical meaning."""
        words = {"not better": "not significantly better", "worse": "significantly worse"}
        return f"{words.get(self.verdict, self.verdict)} than the base"


def keeps_subspace(localizer: str | None) -> bool:
    """True if a delta is a subspace, by the name and version of its localizer."""
    return localizer is not None and localizer.startswith("subspace/")


def density_word(localizer: str | None) -> str:
    """The word for how much a delta keeps, per localizable coordinate."""
    return "numbers per weight" if keeps_subspace(localizer) else "density"


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


def recovered_share(found: Mapping[str, Any] | None) -> str | None:
    """How much of a finetuned model its delta recovers, in one sentence, with a shortfall.

    Args:
        found: the fact `recovery` of a model.

    Returns:
        None without a choice by validation rows, or if it was made before there were bounds.
    """
    if found is None or "bound" not in found:
        return None
    seen = " set apart from train" if found["rows_set_apart_from_train"] else ""
    rows = f"{found['rows']} validation rows{seen}"
    text = f"recovers {found['recovered']:.1%} of the finetuned model's {found['metric']} on {rows}"
    if found["reached"]:
        return f"{text}, and at least {_at_least(found['bound'])} with 95 % confidence"
    bound = "no share" if found["bound"] is None else f"only {_at_least(found['bound'])}"
    return (
        f"{text}, which support {bound} with 95 % confidence:"
        f" {100 * found['shortfall']:.1f} points less than the requested {found['target']:.1%}"
    )


def shortfall(found: Mapping[str, Any] | None) -> str | None:
    """The same sentence, but only if the rows do not support the requested share."""
    return recovered_share(found) if found is not None and "shortfall" in found else None


def _at_least(share: float) -> str:
    """A lower bound as a percentage, rounded down."""
    return f"{math.floor(1000 * share) / 10:.1f}%"
