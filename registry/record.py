"""Frozen data that is stored as JSON."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Frozen data that is stored as JSON and allows no keys but its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return self.model_dump(mode="json")


class Interval(Record):
    """A 95 % interval."""

    low: float
    high: float
