"""The gate on the size of a merged version."""

from collections.abc import Iterator

from restitch.registry.gates.gate import Gate, GateOutcome, Measured
from restitch.registry.sizes import Size


class MaxPatchBytes(Gate):
    """The largest size of the patch."""

    name = "max_patch_bytes"
    limit = Size
    description = "The largest size of the version's patch, in bytes or as text."
    example = "500MB"
    is_maximum = True
    formats = (",.0f", ",.0f")

    def check(self, limit: int, measured: Measured) -> Iterator[GateOutcome]:
        """Check the patch."""
        yield self.outcome(limit, measured.patch_bytes, "the patch")
