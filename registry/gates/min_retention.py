"""The gate on the accuracy that the merged model keeps on the general benchmark."""

from collections.abc import Iterator

from restitch.registry.gates.gate import Gate, GateOutcome, Measured, Ratio


class MinRetention(Gate):
    """The least accuracy on the general benchmark, over that of the base."""

    name = "min_retention"
    limit = Ratio
    description = "The least accuracy on the general benchmark, as a fraction of the base's."
    example = 0.95
    is_maximum = False

    def check(self, limit: float, measured: Measured) -> Iterator[GateOutcome]:
        """Check the benchmark, if the line has one."""
        if measured.retention is not None:
            interval = measured.retention_interval
            subject = "the general benchmark"
            yield self.outcome(limit, measured.retention, subject, interval=interval)
