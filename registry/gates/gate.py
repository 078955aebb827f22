"""Define what a gate is, what it decides on, and what it decides.

Gates are pure: the same limit and the same measurements give the same outcome. A gate that is on
fails closed: what it needs and nobody measured blocks.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from restitch.registry.record import Interval, Record

# The outcome of one gate. A merged version without any gate has the verdict `none`.
Verdict = Literal["passed", "failed", "not measured"]


def _fraction(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool) and not 0 <= value <= 1:
        advice = f"; write {value / 100:g}, not {value}" if 2 <= value <= 100 else ""
        raise ValueError(f"expected a fraction from 0 to 1, found {str(value)[:20]}{advice}")
    return value


# A limit that is a fraction; a percentage is refused with the fraction to write in its place.
Fraction = Annotated[
    float,
    Field(ge=0, le=1, allow_inf_nan=False),
    BeforeValidator(_fraction, json_schema_input_type=Annotated[float, Field(ge=0, le=1)]),
]


class Drop(Record):
    """What a task lost against the champion.

    Attributes:
        value: the absolute loss of a share, such as accuracy; negative for a gain.
        fraction_of: the metric of a task that has no share: the loss is a fraction of the
            champion's value.
        is_noise: whether the loss can be chance.
        against: the version that was the champion.
        interval: its 95 % interval.
        p_value: the probability of such a difference without a real one.
    """

    value: float
    fraction_of: str | None = None
    is_noise: bool
    against: int
    interval: Interval | None = None
    p_value: float | None = None

    @property
    def is_significant(self) -> bool:
        """True for a loss that chance would seldom cause."""
        return self.value > 0 and not self.is_noise

    def sentence(self, task: str) -> str:
        """The loss of a task, as one sentence."""
        p_value = "" if self.p_value is None else f" (p = {self.p_value:.2g})"
        lost = f"{self.value:.4f}"
        if self.fraction_of is not None:
            lost = f"{100 * self.value:.3g} % of its {self.fraction_of}"
        return f"{task} lost {lost} against version {self.against}{p_value}"


@dataclass(frozen=True)
class NotMeasured:
    """Stands for a value that could not be measured.

    Attributes:
        reason: why not, as a part of a sentence: `the task has no data`.
    """

    reason: str = "nothing was measured"


@dataclass(frozen=True)
class Measured:
    """The measurements of a merged version, on which gates decide.

    Attributes:
        normalized: the accuracy over that of the finetuned model, for each task.
        without_gain: the tasks whose finetuned model is not better than the base.
        drops: the loss against the champion, for each task that both hold. A joining task that
            cannot be measured is here, too: no later loss of it would be seen.
        joining: the tasks that are judged as new ones: those whose model is not in the champion,
            or all of them if the method or the masks have changed.
        retention: the accuracy on the general benchmark over that of the base.
        retention_interval: its 95 % interval.
        patch_bytes: the size of the patch.
    """

    normalized: Mapping[str, float | NotMeasured] = field(default_factory=dict)
    without_gain: frozenset[str] = frozenset()
    drops: Mapping[str, Drop | NotMeasured] = field(default_factory=dict)
    joining: frozenset[str] = frozenset()
    retention: float | NotMeasured = NotMeasured()
    retention_interval: Interval | None = None
    patch_bytes: int | NotMeasured = NotMeasured()


class GateOutcome(Record):
    """The outcome of one gate, with the values that decided.

    Attributes:
        value: the value that was compared with the limit; None if nothing was measured.
        interval: its 95 % interval, if it has one.
        passed: whether the limit is met. A value that was not measured does not meet it; a gate
            that has nothing to check is met.
        action: the effect of failing: `block` keeps the version from promotion, `warn` does not.
        task: the task that decided, for a gate on tasks.
        note: the outcome as one sentence.
    """

    gate: str
    limit: float
    value: float | None
    interval: Interval | None = None
    passed: bool
    action: Literal["block", "warn"] = "block"
    task: str | None = None
    note: str | None = None

    @property
    def verdict(self) -> Verdict:
        """The outcome in words."""
        if self.passed:
            return "passed"
        return "not measured" if self.value is None else "failed"

    @property
    def blocks(self) -> bool:
        """True if it keeps the version from promotion."""
        return not self.passed and self.action == "block"

    def as_warning(self) -> "GateOutcome":
        """The same outcome of a gate that only warns."""
        note = self.note if self.passed else f"{self.note} (a warning)"
        return self.model_copy(update={"action": "warn", "note": note})


class Gate(ABC):
    """A limit that a line's file may set, and the check of it.

    Attributes:
        name: the key in the line's file.
        limit: the type of the limit, with its constraints.
        description: a sentence for the reference of keys.
        example: a limit for the reference of keys.
        is_maximum: whether values above the limit fail; otherwise values below it do.
        formats: how a value and the limit are written in messages.
        nothing: why the gate has nothing to check, if it yields no outcome.
        needs_benchmark: whether it can only be measured on a line with a general benchmark.
    """

    name: ClassVar[str]
    limit: ClassVar[Any]
    description: ClassVar[str]
    example: ClassVar[Any]
    is_maximum: ClassVar[bool]
    formats: ClassVar[tuple[str, str]] = (".4f", "g")
    nothing: ClassVar[str] = "nothing to check"
    needs_benchmark: ClassVar[bool] = False

    @abstractmethod
    def check(self, limit: Any, measured: Measured) -> Iterator[GateOutcome]:
        """Compare what was measured with the limit: one outcome for each subject.

        Each subject needs an outcome, also one that was not measured.
        """

    def outcomes(self, limit: Any, measured: Measured) -> tuple[GateOutcome, ...]:
        """The outcomes of the check, at least one."""
        return tuple(self.check(limit, measured)) or (
            GateOutcome(
                gate=self.name,
                limit=limit,
                value=None,
                passed=True,
                note=f"{self.name}: {self.nothing}",
            ),
        )

    def outcome(
        self,
        limit: float,
        value: float | NotMeasured,
        subject: str,
        *,
        task: str | None = None,
        interval: Interval | None = None,
        excused: bool = False,
        remark: str = "",
    ) -> GateOutcome:
        """The outcome for one value.

        Args:
            limit: the line's limit.
            value: what was measured, or why nothing was; that blocks.
            subject: whose value it is, for the message.
            task: the task whose value it is.
            interval: its 95 % interval.
            excused: pass although the value misses the limit.
            remark: an addition to the message.
        """
        if isinstance(value, NotMeasured):
            note = f"{self.name} of {subject}: not measured, because {value.reason}"
            return GateOutcome(
                gate=self.name, limit=limit, value=None, passed=False, task=task, note=note
            )
        met = value <= limit if self.is_maximum else value >= limit
        sign = ("<=" if met else ">") if self.is_maximum else (">=" if met else "<")
        of_value, of_limit = self.formats
        note = f"{self.name} of {subject}: {value:{of_value}} {sign} {limit:{of_limit}}{remark}"
        return GateOutcome(
            gate=self.name,
            limit=limit,
            value=value,
            interval=interval,
            passed=met or excused,
            task=task,
            note=note,
        )
