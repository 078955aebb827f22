"""The base of all specs: frozen plain data with a digest, and the types that several share."""

import json
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, GetJsonSchemaHandler, TypeAdapter
from pydantic_core import CoreSchema

from restitch.merging.digests import digest_json
from restitch.registry.record import Record

Text = Annotated[str, Field(min_length=1)]
# More would overflow in the libraries that count with it.
Count = Annotated[int, Field(ge=1, lt=2**31)]


class Spec(Record):
    """Frozen data that refuses unknown keys, with a digest. `to_json` fills in the defaults.

    The fields are the keys that people write: the JSON schema and the reference of keys are made
    from their types and the docstrings below them.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read what `to_json` gave."""
        return cls.model_validate_json(json.dumps(values))

    @property
    def digest(self) -> str:
        """The digest of all values that differ from a fixed default.

        A new optional key leaves the digests of specs that do not use it as they are. A default
        that depends on another key always enters.
        """
        return digest_json(self.model_dump(mode="json", exclude_defaults=True))


class InFile:
    """Annotates a field whose form in a file is wider than its type.

    `registry.specs.files` turns that form into the type before it validates. The JSON schema
    describes the form, whose type it takes.
    """

    def __init__(self, form: Any) -> None:
        self.form = form

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return handler(TypeAdapter(self.form).core_schema)
