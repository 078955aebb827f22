"""The gate on the accuracy that a joining task reaches in the merged model."""

from collections.abc import Iterator

from restitch.registry.gates.gate import Fraction, Gate, GateOutcome, Measured, NotMeasured

_NO_GAIN = ", but its finetuned model is not significantly better than the base"


class MinNormalized(Gate):
    """The least accuracy of a joining task, over that of its finetuned model."""

    name = "min_normalized"
    limit = Fraction
    description = "The least accuracy of each joining task, as a fraction of its finetuned model's."
    example = 0.9
    is_maximum = False
    nothing = "no task joins"

    def check(self, limit: float, measured: Measured) -> Iterator[GateOutcome]:
        """Check every joining task."""
        for task in sorted(measured.joining):
            value = measured.normalized.get(task, NotMeasured())
            remark = _NO_GAIN if task in measured.without_gain else ""
            yield self.outcome(limit, value, task, task=task, remark=remark)
