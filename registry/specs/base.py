"""What all specs have in common: frozen plain data with a digest and no keys but its own."""

import json
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field

from restitch.merging.digests import digest_json

Text = Annotated[str, Field(min_length=1)]


class Spec(BaseModel):
    """Frozen data that knows no other keys than its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """What `to_json` gave."""
        return cls.model_validate_json(json.dumps(values))

    @property
    def digest(self) -> str:
        """The digest of the resolved spec."""
        return digest_json(self.to_json())
