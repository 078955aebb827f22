"""The gate on the accuracy that the merged model keeps on the general benchmark."""

from collections.abc import Iterator

from restitch.registry.gates.gate import Fraction, Gate, GateOutcome, Measured


class MinRetention(Gate):
    """The least accuracy on the general benchmark, over that of the base."""

    name = "min_retention"
    limit = Fraction
    description = "The least accuracy on the general benchmark, as a fraction of the base's."
    example = 0.95
    is_maximum = False
    needs_benchmark = True

    def check(self, limit: float, measured: Measured) -> Iterator[GateOutcome]:
        """Check the benchmark."""
        interval = measured.retention_interval
        yield self.outcome(limit, measured.retention, "the general benchmark", interval=interval)
