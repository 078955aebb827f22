"""What users describe: a line and a task, as frozen plain data.

A spec is resolved when it is made from a file (`restitch.registry.specs.files`): it means the same
when the file, its folder or our defaults have changed. `to_json`, `from_json`, `digest`.
A source that is a path is absolute; anything else in its place is an address or a hub id,
pinned as `org/name@commit` once it is resolved.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
)

from restitch.merging.errors import BadInput
from restitch.registry.specs.base import Spec, Text
from restitch.registry.specs.gates import GatesSpec
from restitch.registry.specs.localize import LocalizeSpec
from restitch.registry.specs.method import AnyMethod, MethodSpec, TournamentSpec
from restitch.registry.specs.task import Name, TaskSpec, keep_pin

_CRON_FIELD = re.compile(r"[0-9A-Za-z*/,#?-]+\Z")


Actors = Annotated[tuple[Text, ...], Field(min_length=1)]


class ActorsSpec(Spec):
    """Who may decide what about a line; whatever has no list may be done by anybody.

    One list in place of the keys stands for all of them.
    """

    promote: Actors | None = None
    rollback: Actors | None = None
    retire: Actors | None = None
    restore: Actors | None = None
    pin: Actors | None = None
    unpin: Actors | None = None

    def of(self, decision: str) -> tuple[str, ...] | None:
        """Those who may do it; None is anybody."""
        found: tuple[str, ...] | None = getattr(self, decision)
        return found

    @model_serializer(mode="wrap")
    def _lists(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: names for name, names in handler(self).items() if names is not None}


class LineSpec(Spec):
    """A line: its base, how models join it, and what it must keep.

    Attributes:
        base: an absolute path, an address, or a hub id, pinned as `org/name@commit`.
        retention: the general benchmark, described here or as a task of the line.
        require_device: the line is worked on by workers that have it only.
        actors: who may promote, roll back and so on by hand; None is anybody.
    """

    line: Name
    base: Text
    family: Text
    method: AnyMethod
    localize: LocalizeSpec = LocalizeSpec()
    retention: TaskSpec | Name | None = None
    gates: GatesSpec = GatesSpec()
    schedule: str | None = None
    require_device: Literal["cpu", "cuda"] | None = None
    actors: ActorsSpec | None = None

    @field_validator("actors", mode="before")
    @classmethod
    def _same_for_all(cls, value: Any) -> Any:
        given = dict.fromkeys(ActorsSpec.model_fields, value) if isinstance(value, list) else value
        if not isinstance(given, dict):
            return given
        return {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A line without a list is written, and digested, as it was before there were any.
        values: dict[str, Any] = handler(self)
        return {key: value for key, value in values.items() if key != "actors" or value}

    @field_validator("method", mode="before")
    @classmethod
    def _method_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("schedule")
    @classmethod
    def _cron(cls, value: str | None) -> str | None:
        if value is not None:
            fields = value.split()
            if len(fields) != 5 or not all(_CRON_FIELD.match(field) for field in fields):
                raise ValueError(f"{value[:60]!r} is not a cron line such as '*/15 * * * *'")
        return value

    def with_method_settings(self, settings: dict[str, Any]) -> "LineSpec":
        """The same method with other settings."""
        return self.with_method(MethodSpec(name=self.method.name, settings=settings))

    def with_method(self, method: MethodSpec | TournamentSpec) -> "LineSpec":
        """The same with another method."""
        return self.model_copy(update={"method": method})

    def with_base(self, base: str) -> "LineSpec":
        """The same with the base pinned."""
        return self.model_copy(update={"base": base})

    def with_retention(self, retention: TaskSpec | str | None) -> "LineSpec":
        """The same with another benchmark, for instance one whose data is pinned."""
        return self.model_copy(update={"retention": retention})

    def with_pins_of(self, old: "LineSpec") -> "LineSpec":
        """This spec with what it leaves unpinned read at the commits that the old one pinned."""
        new = self.with_base(keep_pin(self.base, old.base))
        if isinstance(new.retention, TaskSpec) and isinstance(old.retention, TaskSpec):
            new = new.with_retention(new.retention.with_pins_of(old.retention))
        return new


def line_changes(old: LineSpec, new: LineSpec) -> list[tuple[str, JsonValue, JsonValue]]:
    """What an existing line's new file changes: (key, old value, new value).

    Raises:
        BadInput: it changes what is fixed.
    """
    changes = [
        (key, before, after) for key, before, after in _differences(old.to_json(), new.to_json())
    ]
    fixed = [c for c in changes if c[0] in ("line", "base", "family")]
    if fixed:
        raise BadInput(
            f"line {old.line}: {' and '.join(key for key, *_ in fixed)} cannot change",
            expected=", ".join(f"{key}: {before}" for key, before, _ in fixed),
            found=", ".join(f"{key}: {after}" for key, _, after in fixed),
            hint="all masks of a line belong to its base; make another line for another base",
        )
    return changes


def _differences(
    old: dict[str, Any], new: dict[str, Any], prefix: str = ""
) -> list[tuple[str, JsonValue, JsonValue]]:
    found: list[tuple[str, JsonValue, JsonValue]] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found.extend(_differences(before, after, f"{prefix}{key}."))
        elif before != after:
            found.append((f"{prefix}{key}", before, after))
    return found
