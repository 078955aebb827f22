"""Strict YAML: a file means what it seems to say, or an error says why it cannot.

Only plain values are read (no tags, no dates; `1e-3` is a number). Duplicate keys, files of
unusual size, deep nesting and aliases that multiply are refused. `checked` turns the errors of
pydantic into one readable message that names the file and lists every problem, with the nearest
known name for an unknown key.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Tag, ValidationError
from pydantic_core import ErrorDetails

from restitch.merging.errors import BadInput
from restitch.merging.files.safe_open import open_regular
from restitch.registry.redaction import first_line

MAX_BYTES = 1 << 20
_MAX_VALUES = 50_000
_MAX_DEPTH = 50
_MAX_DIGITS = 400

Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with its surprises removed."""

    # A document is refused while it is read: one of a megabyte can hold half a million values.
    composed = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Return a node, unless there have been too many."""
        self.composed += 1
        if self.composed > _MAX_VALUES:
            raise _RefusedError(f"the file has more than {_MAX_VALUES:,} values")
        node: yaml.Node | None = super().compose_node(parent, index)
        if isinstance(node, yaml.ScalarNode):
            where, shown = f"line {node.start_mark.line + 1}", ascii(node.value[:80])
            if not _is_text(node.value):
                raise _RefusedError(f"{where}: {shown} has a character that is not allowed in text")
            # YAML 1.1 reads 1:1:1 in base 60, for which Python takes hours where it is long.
            if node.tag.endswith((":int", ":float")) and len(node.value) > _MAX_DIGITS:
                raise _RefusedError(f"{where}: the number {shown} is too long")
        return node

    # A copy: the resolvers of the class itself are shared by the whole process.
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping whose keys are texts and occur once."""
        seen: set[object] = set()
        for key_node, _value in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            where = f"line {key_node.start_mark.line + 1}"
            if not isinstance(key, str):
                raise _RefusedError(f"{where}: the key {key!r} is not a text; put it in quotes")
            if key in seen:
                raise _RefusedError(f"{where}: the key {key!r} occurs twice")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 takes `1e-3` for a text because it has no dot.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+\Z"),
    list("-+0123456789"),
)


class _RefusedError(ValueError):
    """A document that is well-formed YAML but not accepted."""


def read_text(path: Path, what: str, limit: int = MAX_BYTES) -> str:
    """Read a UTF-8 text file.

    Raises:
        BadInput: the file is missing, too large, or not UTF-8.
    """
    try:
        with open_regular(path) as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise BadInput(f"{what} {path} is too large", expected=f"at most {limit:,} bytes")
        return data.decode("utf-8-sig")
    except OSError as error:
        raise BadInput(
            f"{what} {path} cannot be read",
            found=error.strerror,
            hint=f"check the path: it means {path.absolute()}",
        ) from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{what} {path} is not UTF-8 text", found=str(error)) from error


def parse_mapping(text: str, origin: str) -> dict[str, Any]:
    """Read a YAML document that holds a mapping; `origin` names it in errors.

    Raises:
        BadInput: the document is not valid, or not a mapping.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            _measure(node)
        value = None if node is None else loader.construct_document(node)
        json.dumps(value, default=str)  # fails for an integer that is too long to print
    except _RefusedError as error:
        raise BadInput(f"{origin} cannot be used", details=[str(error)]) from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise BadInput(f"{origin} is not valid YAML", details=[_yaml_problem(error)]) from error
    except RecursionError as error:
        raise BadInput(f"{origin} is nested too deeply") from error
    if not isinstance(value, dict):
        raise BadInput(
            f"{origin} does not hold keys and values",
            expected="lines such as 'line: NAME'",
            found="nothing" if value is None else f"a {type(value).__name__}",
        )
    return value


def _yaml_problem(error: Exception) -> str:
    """The problem and its place, in one line."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return first_line(error)
    mark = error.problem_mark
    text = (mark.get_snippet(indent=0) or "").partition("\n")[0].strip()
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}: {text}"


def checked(model: type[Model], values: Mapping[str, Any], origin: str) -> Model:
    """Validate the values.

    Raises:
        BadInput: they are not valid; lists every problem.
    """
    try:
        # Through JSON, where a list can become a tuple although the model is strict about types.
        return model.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        # A default that depends on a wrong value is not a problem of its own.
        problems = sorted(
            {
                _explain(model, problem)
                for problem in error.errors()
                if problem["type"] != "default_factory_not_called"
            }
        )
    raise BadInput(f"{origin} cannot be used", details=problems)


def _unknown_key(key: str, known: list[str], where: str) -> str:
    """Say that a key does not exist, and name the nearest one or all that do."""
    near = get_close_matches(key, known, n=1, cutoff=0.6)
    place = f" in {where}" if where else ""
    if near:
        return f"unknown key '{key}'{place}; did you mean '{near[0]}'?"
    return f"unknown key '{key}'{place}; known: {', '.join(known)}"


def _is_text(value: str) -> bool:
    """True if the text can be written as UTF-8 and be part of a path."""
    return "\0" not in value and not any("\ud800" <= char <= "\udfff" for char in value)


def _measure(root: yaml.Node) -> None:
    """Refuse a document that its aliases make too large."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, depth: int) -> int:
        if depth > _MAX_DEPTH:
            raise _RefusedError(
                f"the file is nested more than {_MAX_DEPTH} deep, or contains itself"
            )
        known = sizes.get(id(node))
        if known is None:
            children: list[yaml.Node] = []
            if isinstance(node, yaml.SequenceNode):
                children = list(node.value)
            elif isinstance(node, yaml.MappingNode):
                children = [part for pair in node.value for part in pair]
            known = 1 + sum(size(child, depth + 1) for child in children)
            sizes[id(node)] = known
        if known > _MAX_VALUES:
            raise _RefusedError(f"with its aliases the file has more than {_MAX_VALUES:,} values")
        return known

    size(root, 0)


def _explain(model: type[BaseModel], problem: ErrorDetails) -> str:
    *path, key = [part for part in problem["loc"] if not _is_tag(part)] or [""]
    where = ".".join(str(part) for part in path)
    full = f"{where}.{key}" if where else str(key)
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        owner = _model_at(model, problem["loc"][:-1])
        return _unknown_key(str(key), list(owner.model_fields) if owner else [], where)
    if kind == "missing":
        return f"'{full}' is missing"
    value = _short(problem["input"])
    if kind == "literal_error":
        return f"{full}: expected {context.get('expected')}, found {value}"
    if kind == "too_short":
        return f"{full}: expected a list of {context.get('min_length')} or more, found {value}"
    if kind == "value_error":
        return f"{full}: {context.get('error')}" if full else str(context.get("error"))
    message = problem["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    advice = ""
    if kind == "string_type" and isinstance(problem["input"], bool | int | float):
        advice = "; put it in quotes"
    return f"{full}: expected {message}, found {value}{advice}"


def _is_tag(part: int | str) -> bool:
    """True for the tag of a union, which pydantic adds to the path of a value."""
    return str(part).startswith("as ")


def _model_at(model: type[BaseModel], path: Sequence[int | str]) -> type[BaseModel] | None:
    current: Any = model
    for part in path:
        if isinstance(part, int):  # the items of a list all have one type
            continue
        if _is_tag(part):
            current = _tagged(current, str(part))
            continue
        owner = _model_in(current)
        if owner is None or part not in owner.model_fields:
            return None
        current = owner.model_fields[part].annotation
    return _model_in(current)


def _tagged(annotation: Any, tag: str) -> Any:
    """The choice with a tag in a union."""
    choices = get_args(annotation)
    return next(
        (one for one in choices if Tag(tag) in getattr(one, "__metadata__", ())), annotation
    )


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Annotated, Union, UnionType, tuple):
        models = [_model_in(choice) for choice in get_args(annotation)]
        return next((choice for choice in models if choice is not None), None)
    return None


def _short(value: object) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
