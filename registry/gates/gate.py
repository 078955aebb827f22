"""Define what a gate is, what it decides on, and what it decides.

Gates are pure: the same limit and the same measurements give the same outcome.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from restitch.registry.record import Interval, Record

Ratio = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Drop:
    """The accuracy that a task lost against the champion.

    Attributes:
        value: the absolute loss; negative for a gain.
        is_noise: whether the loss can be chance.
        interval: its 95 % interval, if both were measured on the same rows.
        p_value: the probability of such a difference without a real one, likewise.
    """

    value: float
    is_noise: bool
    interval: Interval | None = None
    p_value: float | None = None


@dataclass(frozen=True)
class Measured:
    """The measurements of a merged version, on which gates decide.

    Attributes:
        normalized: the accuracy over that of the finetuned model, by task.
        without_gain: the tasks whose finetuned model is not better than the base.
        drops: the loss against the champion, for each task that both hold.
        joining: the tasks whose model is not in the champion.
        retention: the accuracy on the general benchmark over that of the base.
        retention_interval: its 95 % interval.
        patch_bytes: the size of the patch.
    """

    normalized: Mapping[str, float] = field(default_factory=dict)
    without_gain: frozenset[str] = frozenset()
    drops: Mapping[str, Drop] = field(default_factory=dict)
    joining: frozenset[str] = frozenset()
    retention: float | None = None
    retention_interval: Interval | None = None
    patch_bytes: int | None = None


class GateOutcome(Record):
    """The outcome of one gate, with the values that decided.

    Attributes:
        value: the value that was compared with the limit.
        interval: its 95 % interval, if it has one.
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
    """

    name: ClassVar[str]
    limit: ClassVar[Any]
    description: ClassVar[str]
    example: ClassVar[Any]
    is_maximum: ClassVar[bool]
    formats: ClassVar[tuple[str, str]] = (".4f", "g")

    @abstractmethod
    def check(self, limit: Any, measured: Measured) -> Iterator[GateOutcome]:
        """Compare what was measured with the limit: one outcome for each subject.

        A gate without a measurement gives no outcome and so passes.
        """

    def outcome(
        self,
        limit: float,
        value: float,
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
            value: what was measured.
            subject: whose value it is, for the message.
            task: the task whose value it is.
            interval: its 95 % interval.
            excused: pass although the value misses the limit.
            remark: an addition to the message.
        """
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
