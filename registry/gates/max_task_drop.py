"""The gate on the accuracy that a task loses against the champion."""

from collections.abc import Iterator

from restitch.registry.gates.gate import Fraction, Gate, GateOutcome, Measured, NotMeasured


class MaxTaskDrop(Gate):
    """The largest loss of a task against the champion; a loss that can be chance passes."""

    name = "max_task_drop"
    limit = Fraction
    description = (
        "The most absolute accuracy that a task may lose against the champion; a fraction of the "
        "champion's value if lower is better, as for perplexity. "
        "A loss that can be chance passes."
    )
    example = 0.01
    is_maximum = True
    nothing = "no task of the champion is in this version"

    def check(self, limit: float, measured: Measured) -> Iterator[GateOutcome]:
        """Check every task that the champion holds, too, and joining tasks without a value."""
        for task, drop in sorted(measured.drops.items()):
            if isinstance(drop, NotMeasured):
                yield self.outcome(limit, drop, task, task=task)
                continue
            remark = ""
            if drop.value > limit:
                remark = ", within noise" if drop.is_noise else ""
                remark += "" if drop.p_value is None else f" (p = {drop.p_value:.2g})"
            yield self.outcome(
                limit,
                drop.value,
                task,
                task=task,
                interval=drop.interval,
                excused=drop.is_noise,
                remark=remark,
            )
