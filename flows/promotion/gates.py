"""Gates: may this merged version become the champion? Pure decisions over measured numbers.

A gate that has nothing to measure (no retention data, a task without data, a first version
without a champion to fall behind) passes by having no check. Each check keeps the value and
the limit that decided, for the audit trail. A gate blocks, or only warns where the line says so.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Gates:
    """Limits of a line; None switches a gate off.

    Attributes:
        min_retention: least fraction of the base's accuracy on the general benchmark.
        max_task_drop: most absolute accuracy that a task may lose against the champion; a
            loss that chance alone would make passes.
        min_normalized: least accuracy of a joining task over its finetuned model's.
        max_patch_bytes: largest size of the patch.
        warn: the gates that block nothing.
    """

    min_retention: float | None = None
    max_task_drop: float | None = None
    min_normalized: float | None = None
    max_patch_bytes: int | None = None
    warn: tuple[str, ...] = ()


Ends = tuple[float, float]


@dataclass(frozen=True)
class Drop:
    """What a task lost against the champion.

    Attributes:
        value: absolute; below zero where it gained.
        is_noise: whether chance alone may have made it.
        interval: its 95 % interval, where both were measured on the same rows.
        p_value: of no change, likewise.
    """

    value: float
    is_noise: bool
    interval: Ends | None = None
    p_value: float | None = None


@dataclass(frozen=True)
class Measured:
    """What a merged version reached.

    Attributes:
        normalized: by task.
        drops: against the champion, by task that both hold.
        retention: on the general benchmark, with its interval.
        patch_bytes: its size.
    """

    normalized: Mapping[str, float] = field(default_factory=dict)
    drops: Mapping[str, Drop] = field(default_factory=dict)
    retention: float | None = None
    retention_interval: Ends | None = None
    patch_bytes: int | None = None


@dataclass(frozen=True)
class Check:
    """One gate applied to one subject.

    Attributes:
        blocks: whether failing it keeps the version from promotion.
        interval: of the value, where it has one.
        note: what else decided.
    """

    gate: str
    subject: str
    value: float
    limit: float
    passed: bool
    blocks: bool = True
    interval: Ends | None = None
    note: str = ""

    def __str__(self) -> str:
        sign = (">" if self.value > self.limit else "<=") if self.gate.startswith("max") else ""
        sign = sign or (">=" if self.value >= self.limit else "<")
        value = f"{self.value:,.0f}" if self.gate == "max_patch_bytes" else f"{self.value:.4f}"
        limit = f"{self.limit:,.0f}" if self.gate == "max_patch_bytes" else f"{self.limit:g}"
        text = f"{self.gate} of {self.subject}: {value} {sign} {limit}{self.note}"
        return text if self.passed or self.blocks else f"{text} (a warning)"


def check_gates(gates: Gates, merged: Measured, joining: Set[str]) -> tuple[Check, ...]:
    """Apply every gate that is on, in a fixed order.

    Args:
        gates: the line's limits.
        merged: what the new version reached.
        joining: tasks whose model is not in the champion.

    Returns:
        One check per gate and subject; the version passes if all that block do.
    """
    checks = []

    def check(
        gate: str,
        subject: str,
        value: float,
        passed: bool,
        interval: Ends | None = None,
        note: str = "",
    ) -> None:
        limit, blocks = getattr(gates, gate), gate not in gates.warn
        checks.append(Check(gate, subject, value, limit, passed, blocks, interval, note))

    if gates.min_retention is not None and merged.retention is not None:
        value = merged.retention
        enough = value >= gates.min_retention
        interval = merged.retention_interval
        check("min_retention", "the general benchmark", value, enough, interval=interval)
    if gates.max_task_drop is not None:
        for task, drop in sorted(merged.drops.items()):
            small = drop.value <= gates.max_task_drop
            note = "" if small or drop.p_value is None else f" (p = {drop.p_value:.2g})"
            if drop.is_noise and not small:
                note = f", within noise{note}"
            passed = small or drop.is_noise
            check("max_task_drop", task, drop.value, passed, interval=drop.interval, note=note)
    if gates.min_normalized is not None:
        for task in sorted(merged.normalized.keys() & joining):
            value = merged.normalized[task]
            check("min_normalized", task, value, value >= gates.min_normalized)
    if gates.max_patch_bytes is not None and merged.patch_bytes is not None:
        size = merged.patch_bytes
        check("max_patch_bytes", "the patch", size, size <= gates.max_patch_bytes)
    return tuple(checks)
