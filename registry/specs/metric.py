"""The metrics: one value of many rows, and which direction is better.

Shares lie between 0 and 1, and higher is better; for the others lower is better. All code that
compares, averages or ranks values of several tasks asks a `Metric`. A new one needs an entry here
and the values of its rows in `modeling.row_values`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

MetricName = Literal["accuracy", "f1", "exact_match", "perplexity", "squared_error"]


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: the name in task files, records and MLflow.
        lower_is_better: the direction.
        least: the best value, where lower is better.
    """

    name: MetricName
    lower_is_better: bool = False
    least: float = 1.0

    @property
    def is_share(self) -> bool:
        """True for a share between 0 and 1."""
        return not self.lower_is_better

    def ratio(self, value: float, reference: float) -> float | None:
        """How much of the reference a value reaches: above 1 is better than the reference.

        It is inverted where lower is better. None if it would be a division by zero.
        """
        above, below = (reference, value) if self.lower_is_better else (value, reference)
        return above / below if below else None

    def reaches(self, value: float, share: float, reference: float) -> bool:
        """True if a value reaches a share of the reference."""
        if self.lower_is_better:
            return share * value <= reference
        return value >= share * reference

    def loss(self, before: float, after: float) -> float:
        """What a value lost; negative for an improvement.

        Shares: the difference. Others: as a fraction of the value before, because a limit on their
        difference would mean something else for every task.
        """
        if self.is_share:
            return before - after
        return (after - before) / before if before else after

    def is_better(self, difference: float) -> bool:
        """True if a difference, the later value minus the earlier one, is an improvement."""
        return difference < 0 if self.lower_is_better else difference > 0

    def worth(self, value: float) -> float:
        """A number between 0 and 1 that grows with quality, to average over tasks and rank by.

        Shares are themselves. A perplexity is inverted, which gives the geometric mean of the
        probabilities of the tokens; an error e gives 1 / (1 + e).
        """
        return value if self.is_share else 1 / max(value + (1.0 - self.least), 1.0)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy"),
        Metric("f1"),
        Metric("exact_match"),
        Metric("perplexity", lower_is_better=True),
        Metric("squared_error", lower_is_better=True, least=0.0),
    )
}


def mean_share(values: Iterable[tuple[str, float | None]]) -> float | None:
    """The mean of the values that are shares; None if there are none.

    A perplexity or an error has another scale than an accuracy, so it has no part in the mean.

    Args:
        values: metrics by name, with their values.
    """
    shares = [v for name, v in values if v is not None and METRICS[name].is_share]
    return sum(shares) / len(shares) if shares else None
