"""What an evaluation keeps of every row, and how rows become one value and an interval.

There are four kinds: `Bits` (a row is right or wrong), `Losses` (a row has a loss, for perplexity),
`Errors` (a row has an error) and `Classes` (F1, which no single row has). All of them can be
compared row by row with those of another model.

Intervals: Wilson's for shares of right rows, and the bootstrap over rows for the others.
Paired tests: McNemar's for right rows (see `significance`), and for the others the permutation test
that exchanges the two models on random rows (Good 2005, chapter 3). Everything random is seeded.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from restitch.modeling.significance import (
    Paired,
    compare_right,
    right_ratio_bound,
    right_ratio_interval,
    wilson,
)
from restitch.registry.specs.metric import METRICS, Metric

# A loss per token in place of one that is not finite: worse than all real ones, and finite.
WORST = 1e30

_RESAMPLES = 1000
_EXCHANGES = 1999
# Numbers that are drawn at once.
_AT_ONCE = 1 << 22
# Sums in another order differ by less than this share.
_ROUNDING = 1e-9
_LARGEST_EXPONENT = 700.0


@dataclass(frozen=True, eq=False)
class RowValues(ABC):
    """The outcomes of all rows by one metric.

    Attributes:
        metric: with its direction.
    """

    metric: Metric

    @property
    @abstractmethod
    def count(self) -> int:
        """The number of rows."""

    @abstractmethod
    def _at(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """The values of several selections of rows, [selections], from [selections, rows]."""

    @abstractmethod
    def _row_differences(self, other: Self) -> NDArray[np.float64]:
        """How much better the other model is on each row."""

    @abstractmethod
    def _exchanged(self, other: Self, swapped: NDArray[np.bool_]) -> NDArray[np.float64]:
        """The other model's value minus this one's, after an exchange of the models on some rows.

        Args:
            other: the other model.
            swapped: [times, rows].

        Returns:
            [times], or any increasing function of it.
        """

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Plain values."""

    def value(self) -> float:
        """The value of all rows."""
        return float(self._at(np.arange(self.count)[None])[0])

    def interval(self) -> tuple[float, float]:
        """Its 95 % interval."""
        return _ends(np.concatenate([self._at(rows) for rows in self._draws()]))

    def compare(self, other: Self) -> Paired:
        """Compare another model with this one on the same rows.

        Raises:
            ValueError: the rows or the metrics differ.
        """
        self._check(other)
        differences = np.concatenate([other._at(rows) - self._at(rows) for rows in self._draws()])
        low, high = _ends(differences)
        by_row = self._row_differences(other)
        return Paired(
            difference=other.value() - self.value(),
            low=low,
            high=high,
            p_value=self._p_value(other),
            gained=int((by_row > 0).sum()),
            lost=int((by_row < 0).sum()),
            rows=self.count,
        )

    def ratio_interval(self, other: Self) -> tuple[float, float] | None:
        """The 95 % interval of how much the other model reaches of this one; see `Metric.ratio`.

        None if it has none, because a value is 0.
        """
        self._check(other)
        ratios = self._drawn_ratios(other)
        if any(ratio is None for ratio in ratios):
            return None
        return _ends(np.array(ratios))

    def ratio_bound(self, other: Self) -> float | None:
        """The lower bound of that ratio, one-sided with 95 % confidence; never above the ratio.

        None if the ratio is a division by zero, or if no row supports a bound above 0.
        """
        self._check(other)
        ratio = self.metric.ratio(other.value(), self.value())
        bound = self._lower_bound(other)
        return None if ratio is None or bound is None else min(bound, ratio)

    def _lower_bound(self, other: Self) -> float | None:
        # A division by zero: nothing is left to reach in these rows.
        ratios = [np.inf if each is None else each for each in self._drawn_ratios(other)]
        return float(np.quantile(ratios, 0.05, method="lower"))

    def _drawn_ratios(self, other: Self) -> list[float | None]:
        return [
            self.metric.ratio(float(theirs), float(ours))
            for rows in self._draws()
            for theirs, ours in zip(other._at(rows), self._at(rows), strict=True)
        ]

    def _check(self, other: Self) -> None:
        if self.metric != other.metric or self.count != other.count or not self.count:
            raise ValueError("only models on the same rows can be compared row by row")

    def _p_value(self, other: Self) -> float:
        """The share of exchanges whose difference is at least as large as that of the models."""
        seen = abs(float(self._exchanged(other, np.zeros((1, self.count), dtype=np.bool_))[0]))
        least = seen - _ROUNDING * max(seen, 1e-300)
        random = np.random.default_rng(0)

        def draw(times: int) -> NDArray[np.float64]:
            return self._exchanged(other, random.random((times, self.count)) < 0.5)

        as_large = sum(int((np.abs(part) >= least).sum()) for part in self._parts(_EXCHANGES, draw))
        return (1 + as_large) / (1 + _EXCHANGES)

    def _draws(self) -> Iterator[NDArray[np.int64]]:
        """Selections of rows with replacement: always the same ones for as many rows."""
        random = np.random.default_rng(0)
        yield from self._parts(
            _RESAMPLES, lambda times: random.integers(0, self.count, (times, self.count))
        )

    def _parts(self, times: int, draw: Callable[[int], NDArray[Any]]) -> Iterator[NDArray[Any]]:
        most = max(1, _AT_ONCE // max(1, self.count))
        for start in range(0, times, most):
            yield draw(min(most, times - start))


@dataclass(frozen=True, eq=False)
class Bits(RowValues):
    """Rows that are right or wrong.

    Attributes:
        right: one boolean per row.
    """

    right: NDArray[np.bool_]

    @property
    def count(self) -> int:
        """The number of rows."""
        return len(self.right)

    def interval(self) -> tuple[float, float]:
        """Wilson's interval."""
        return wilson(int(self.right.sum()), self.count)

    def compare(self, other: Self) -> Paired:
        """McNemar's test, with the interval of Agresti and Min."""
        self._check(other)
        return compare_right(self.right, other.right)

    def ratio_interval(self, other: Self) -> tuple[float, float] | None:
        """The interval of the ratio of two shares, by the delta method."""
        self._check(other)
        return right_ratio_interval(self.right, other.right)

    def to_json(self) -> dict[str, Any]:
        """One bit per row, most significant first."""
        return {"right": np.packbits(self.right).tobytes().hex(), "count": self.count}

    def _lower_bound(self, other: Self) -> float | None:
        return right_ratio_bound(self.right, other.right)

    def _at(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        result: NDArray[np.float64] = self.right[rows].mean(1)
        return result

    def _row_differences(self, other: Self) -> NDArray[np.float64]:
        return other.right.astype(np.float64) - self.right

    def _exchanged(self, other: Self, swapped: NDArray[np.bool_]) -> NDArray[np.float64]:
        return _signed(self._row_differences(other), swapped)


@dataclass(frozen=True, eq=False)
class Losses(RowValues):
    """Texts with their losses, for perplexity: exp of the mean loss of all tokens.

    Attributes:
        losses: the negative log-likelihood of each text, float64.
        tokens: the number of tokens of each text.
    """

    losses: NDArray[np.float64]
    tokens: NDArray[np.float64]

    @classmethod
    def of(cls, metric: Metric, losses: NDArray[np.float64], tokens: NDArray[Any]) -> "Losses":
        """Texts whose losses may not be finite: such a text has the worst one."""
        counts = tokens.astype(np.float64)
        return cls(metric, np.where(np.isfinite(losses), losses, WORST * counts), counts)

    @property
    def count(self) -> int:
        """The number of rows."""
        return len(self.losses)

    def to_json(self) -> dict[str, Any]:
        """The losses and tokens of all rows as little-endian float64."""
        return {"losses": _hex(self.losses), "tokens": _hex(self.tokens)}

    def _at(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        mean = self.losses[rows].sum(1) / np.maximum(self.tokens[rows].sum(1), 1.0)
        return np.asarray(np.exp(np.minimum(mean, _LARGEST_EXPONENT)))

    def _row_differences(self, other: Self) -> NDArray[np.float64]:
        return self.losses - other.losses

    def _exchanged(self, other: Self, swapped: NDArray[np.bool_]) -> NDArray[np.float64]:
        return _signed(self._row_differences(other), swapped)


@dataclass(frozen=True, eq=False)
class Errors(RowValues):
    """Rows with an error, of which the value is the mean.

    Attributes:
        errors: one per row, float64; lower is better.
    """

    errors: NDArray[np.float64]

    @classmethod
    def of(cls, metric: Metric, errors: NDArray[np.float64]) -> "Errors":
        """Rows whose errors may not be finite: such a row has the worst one."""
        return cls(metric, np.where(np.isfinite(errors), errors, WORST))

    @property
    def count(self) -> int:
        """The number of rows."""
        return len(self.errors)

    def to_json(self) -> dict[str, Any]:
        """The errors of all rows as little-endian float64."""
        return {"errors": _hex(self.errors)}

    def _at(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        result: NDArray[np.float64] = self.errors[rows].mean(1)
        return result

    def _row_differences(self, other: Self) -> NDArray[np.float64]:
        return self.errors - other.errors

    def _exchanged(self, other: Self, swapped: NDArray[np.bool_]) -> NDArray[np.float64]:
        return _signed(self._row_differences(other), swapped)


@dataclass(frozen=True, eq=False)
class Classes(RowValues):
    """Rows with a predicted class, for F1.

    Attributes:
        targets: the class of each row.
        predicted: the predicted one; `classes` for a row without a prediction.
        classes: their number.
    """

    targets: NDArray[np.int64]
    predicted: NDArray[np.int64]
    classes: int

    @property
    def count(self) -> int:
        """The number of rows."""
        return len(self.targets)

    def to_json(self) -> dict[str, Any]:
        """The classes of all rows as little-endian int32."""
        return {
            "classes": self.classes,
            "targets": self.targets.astype("<i4").tobytes().hex(),
            "predicted": self.predicted.astype("<i4").tobytes().hex(),
        }

    def _at(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        return self._f1(self.targets[rows], self.predicted[rows])

    def _row_differences(self, other: Self) -> NDArray[np.float64]:
        ours, theirs = (one.predicted == self.targets for one in (self, other))
        return np.asarray(theirs.astype(np.float64) - ours)

    def _exchanged(self, other: Self, swapped: NDArray[np.bool_]) -> NDArray[np.float64]:
        targets = np.broadcast_to(self.targets, swapped.shape)
        first = np.where(swapped, other.predicted, self.predicted)
        second = np.where(swapped, self.predicted, other.predicted)
        return self._f1(targets, second) - self._f1(targets, first)

    def _f1(self, targets: NDArray[np.int64], predicted: NDArray[np.int64]) -> NDArray[np.float64]:
        """F1 of class 1 of two, or the mean over more classes, [selections].

        A class that neither occurs nor is predicted has F1 zero.
        """
        hits = self._counts(np.where(targets == predicted, targets, self.classes))
        total = self._counts(targets) + self._counts(predicted)
        each = 2 * hits / np.maximum(total, 1)
        result: NDArray[np.float64] = each[:, 1] if self.classes == 2 else each.mean(1)
        return result

    def _counts(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """How often each class occurs in each selection, [selections, classes]."""
        width = self.classes + 1  # the last column is for rows without a prediction
        cells = (values + np.arange(len(values))[:, None] * width).ravel()
        counts = np.bincount(cells, minlength=len(values) * width)
        return counts.reshape(len(values), width)[:, : self.classes]


def rows_from_json(metric: str, data: Mapping[str, Any]) -> RowValues:
    """Read what `to_json` wrote."""
    of = METRICS[metric]
    if "right" in data:
        packed = np.frombuffer(bytes.fromhex(data["right"]), dtype=np.uint8)
        return Bits(of, np.unpackbits(packed, count=data["count"]).astype(np.bool_))
    if "losses" in data:
        losses, tokens = (
            np.frombuffer(bytes.fromhex(data[name]), dtype="<f8") for name in ("losses", "tokens")
        )
        return Losses(of, losses, tokens)
    if "errors" in data:
        return Errors(of, np.frombuffer(bytes.fromhex(data["errors"]), dtype="<f8"))
    targets, predicted = (
        np.frombuffer(bytes.fromhex(data[name]), dtype="<i4").astype(np.int64)
        for name in ("targets", "predicted")
    )
    return Classes(of, targets, predicted, data["classes"])


def _hex(values: NDArray[np.float64]) -> str:
    return values.astype("<f8").tobytes().hex()


def _signed(differences: NDArray[np.float64], swapped: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The sum of the differences, each with its sign changed where the models are exchanged."""
    result: NDArray[np.float64] = np.where(swapped, -1.0, 1.0) @ differences
    return result


def _ends(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
