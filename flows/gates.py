"""Gates: may this merged version become the champion? Pure decisions over measured numbers.

A gate that has nothing to measure (no retention data, a task without data, a first version
without a champion to fall behind) passes by having no check. Each check keeps the value and
the limit that decided, for the audit trail.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass


@dataclass(frozen=True)
class Gates:
    """Limits of a line; None switches a gate off.

    Attributes:
        min_retention: least fraction of the base's accuracy on the general benchmark.
        max_task_drop: most absolute accuracy that a task may lose against the champion.
        min_normalized: least accuracy of a joining task over its finetuned model's.
    """

    min_retention: float | None = None
    max_task_drop: float | None = None
    min_normalized: float | None = None


@dataclass(frozen=True)
class Measured:
    """What a merged version reached: by task, and on the general benchmark."""

    accuracy: Mapping[str, float]
    normalized: Mapping[str, float]
    retention: float | None = None


@dataclass(frozen=True)
class Check:
    """One gate applied to one subject."""

    gate: str
    subject: str
    value: float
    limit: float
    passed: bool

    def __str__(self) -> str:
        sign = {
            (True, True): "<=",
            (True, False): ">",
            (False, True): ">=",
            (False, False): "<",
        }[(self.gate == "max_task_drop", self.passed)]
        return f"{self.gate} of {self.subject}: {self.value:.4f} {sign} {self.limit:g}"


def check_gates(
    gates: Gates, merged: Measured, champion: Measured | None, joining: Set[str]
) -> tuple[Check, ...]:
    """Apply every gate that is on, in a fixed order.

    Args:
        gates: the line's limits.
        merged: what the new version reached.
        champion: what the present champion reached; None for a first version.
        joining: tasks whose model is not in the champion.

    Returns:
        One check per gate and subject; the version passes if all do.
    """
    checks = []
    if gates.min_retention is not None and merged.retention is not None:
        value, limit = merged.retention, gates.min_retention
        checks.append(Check("min_retention", "the general benchmark", value, limit, value >= limit))
    if gates.max_task_drop is not None and champion is not None:
        limit = gates.max_task_drop
        for task in sorted(merged.accuracy.keys() & champion.accuracy.keys()):
            drop = champion.accuracy[task] - merged.accuracy[task]
            checks.append(Check("max_task_drop", task, drop, limit, drop <= limit))
    if gates.min_normalized is not None:
        limit = gates.min_normalized
        for task in sorted(merged.normalized.keys() & joining):
            value = merged.normalized[task]
            checks.append(Check("min_normalized", task, value, limit, value >= limit))
    return tuple(checks)
