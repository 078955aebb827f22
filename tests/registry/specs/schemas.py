"""Check the text of line and task files against their JSON schemas."""

from functools import cache
from typing import Literal

from jsonschema import Draft202012Validator

from restitch.registry.specs.schema import schema_of
from restitch.registry.specs.strict_yaml import parse_mapping


@cache
def _validator(kind: Literal["line", "task"]) -> Draft202012Validator:
    schema = schema_of(kind)
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def schema_problems(kind: Literal["line", "task"], text: str) -> list[str]:
    """The problems that the schema finds in a file, place by place."""
    values = parse_mapping(text, "file.yaml")
    return [f"{e.json_path}: {e.message}" for e in _validator(kind).iter_errors(values)]
