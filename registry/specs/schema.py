"""JSON schemas of line and task files, with which editors complete and check keys."""

from typing import Any, Literal

from restitch.registry.specs.base import Spec
from restitch.registry.specs.line import LineSpec
from restitch.registry.specs.task import TaskSpec

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema_of(kind: Literal["line", "task"]) -> dict[str, Any]:
    """The JSON schema of a line or task file, short forms included.

    Every key has a description, and where it helps a default and examples.
    """
    kinds: dict[str, type[Spec]] = {"line": LineSpec, "task": TaskSpec}
    schema = kinds[kind].model_json_schema()
    for part in (schema, *schema["$defs"].values()):
        for key in part.get("properties", {}).values():  # a docstring may have several lines
            key["description"] = " ".join(key.get("description", "").split())
    return {"$schema": _DIALECT, **schema, "title": f"restitch {kind} file"}
