"""What users describe: a line and a task, as frozen plain data.

A spec is resolved when it is made from a file (`restitch.registry.specs.files`): it means the same
when the file, its folder or our defaults have changed. `to_json`, `from_json`, `digest`.
A source that is a path is absolute; anything else in its place is an address or a hub id,
pinned as `org/name@commit` once it is resolved.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    Tag,
    field_validator,
    model_serializer,
    model_validator,
)
from restitch.merging.errors import BadInput
from restitch.registry.specs.base import Spec, Text, parsed_size
from restitch.registry.specs.localize import LocalizeSpec as LocalizeSpec
from restitch.registry.specs.method import AnyMethod
from restitch.registry.specs.method import MethodSpec as MethodSpec
from restitch.registry.specs.method import ObjectiveSpec as ObjectiveSpec
from restitch.registry.specs.method import TournamentSpec as TournamentSpec

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}\Z")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?(@[\w./-]+)?\Z", re.ASCII)
_PIN = re.compile(r"@[0-9a-f]{40}\Z")
_CRON_FIELD = re.compile(r"[0-9A-Za-z*/,#?-]+\Z")


def check_name(name: str) -> str:
    """The name of a line or a task.

    Raises:
        ValueError: it is not one.
    """
    if not NAME.match(name):
        raise ValueError(
            f"{name[:80]!r} is not a name: 1 to 63 of a-z, 0-9, '_' and '-', "
            "beginning with a letter or digit"
        )
    return name


Name = Annotated[str, BeforeValidator(lambda v: check_name(v) if isinstance(v, str) else v)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Actors = Annotated[tuple[Text, ...], Field(min_length=1)]

# The tags keep pydantic from reporting what is wrong with the other choice.
Texts = Annotated[
    Annotated[tuple[Text, ...], Tag("as list")] | Annotated[Literal["openai"], Tag("as word")],
    Discriminator(lambda value: "as word" if isinstance(value, str) else "as list"),
]


GateName = Literal["min_retention", "max_task_drop", "min_normalized", "max_patch_bytes"]


class GatesSpec(Spec):
    """What a merged version must reach to be promoted; None is no gate.

    Attributes:
        min_retention: the fraction of the base's accuracy on the general benchmark.
        max_task_drop: absolute accuracy that a task may lose against the champion.
        min_normalized: accuracy over that of the finetuned model, of each joining task.
        max_patch_bytes: the size of what the version adds to its base; may be given as `500MB`.
        warn: the gates that are only said when they fail, and keep nothing from promotion.
    """

    min_retention: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    max_task_drop: Fraction | None = None
    min_normalized: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    max_patch_bytes: Annotated[int, Field(ge=1)] | None = None
    warn: tuple[GateName, ...] = ()

    @field_validator("max_patch_bytes", mode="before")
    @classmethod
    def _size(cls, value: Any) -> Any:
        return parsed_size(value)

    @model_validator(mode="after")
    def _warns_of_gates_that_are_on(self) -> Self:
        off = [name for name in self.warn if getattr(self, name) is None]
        if off:
            raise ValueError(f"warn names {', '.join(off)}, which has no limit here")
        return self


class SampleSpec(Spec):
    """Some of the rows that a task is evaluated on: each class has its share of them.

    Attributes:
        rows: how many; all where there are fewer.
        seed: which ones.
    """

    rows: Annotated[int, Field(ge=1)]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class DataSpec(Spec):
    """Where a task's examples are.

    Attributes:
        path: an absolute path, or a hub id, pinned as `org/name@commit`.
        train: the file or split for calibration; the others likewise.
        input: the column, or columns, that the model reads.
        label: the column of the class index or name.
        sample: evaluate on so many rows only, the same ones every time; all where it is None.
        content: what the rows are read from, by digest; taken at registration where it is
            not given, and compared before rows are used.
    """

    path: Text
    train: Text | None = None
    validation: Text | None = None
    test: Text | None = None
    input: tuple[Text, ...] = ()
    label: Text | None = None
    sample: SampleSpec | None = None
    content: dict[str, JsonValue] | None = None

    @field_validator("sample", mode="before")
    @classmethod
    def _rows_alone(cls, value: Any) -> Any:
        return {"rows": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("input", mode="before")
    @classmethod
    def _one_column(cls, value: Any) -> Any:
        if isinstance(value, str):
            return (value,)
        return tuple(value) if isinstance(value, list) else value


class HeadSpec(Spec):
    """How the classes are described.

    Attributes:
        labels: the classes in order; `openai` are the 1000 curated ImageNet names; None
            where `labels_from` says that the data set names them.
        templates: prompts with `{}` for the label; `openai` are the 80 of CLIP.
    """

    labels: Texts | None = None
    templates: Texts = ("{}",)
    labels_from: Literal["dataset"] | None = None

    @model_validator(mode="after")
    def _one_source_of_labels(self) -> Self:
        if (self.labels is None) == (self.labels_from is None):
            raise ValueError("give either 'labels' or 'labels_from: dataset'")
        if isinstance(self.labels, tuple):
            if len(self.labels) < 2:
                raise ValueError("a head needs at least two labels")
            if len(set(self.labels)) != len(self.labels):
                twice = sorted({x for x in self.labels if self.labels.count(x) > 1})
                raise ValueError(f"labels occur twice: {', '.join(map(repr, twice[:5]))}")
        if isinstance(self.templates, tuple):
            if not self.templates:
                raise ValueError("a head needs at least one template, for instance '{}'")
            for template in self.templates:
                if "{}" not in template:
                    raise ValueError(f"template {template!r} has no '{{}}' for the label")
        return self


class TaskSpec(Spec):
    """One skill: its examples, its head, its measure.

    Attributes:
        data: None means localized without data and not evaluated.
        scale: what cosines are multiplied with; None is the family's own.
        max_length: tokens per text; None is the model's own limit.
    """

    task: Name
    data: DataSpec | None = None
    head: HeadSpec | None = None
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    max_length: Annotated[int, Field(ge=1)] | None = None
    metric: Literal["accuracy", "f1"] = "accuracy"

    def with_pins_of(self, old: "TaskSpec") -> "TaskSpec":
        """This spec with its unpinned data read at the commit that the old one pinned."""
        if self.data is None or old.data is None:
            return self
        path = keep_pin(self.data.path, old.data.path)
        return self.model_copy(update={"data": self.data.model_copy(update={"path": path})})


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


def keep_pin(new: str, old: str) -> str:
    """The old source where the new one is the same without its pinned commit."""
    return old if _PIN.sub("", old) == new else new


def split_pin(source: str) -> tuple[str, str | None]:
    """A hub id without its revision, and the revision; a path is never split."""
    if source.startswith("/"):
        return source, None
    name, _, revision = source.partition("@")
    return name, revision or None


def is_hub_id(source: str) -> bool:
    """Whether a source that is no path has the form of a hub id."""
    return _HUB_ID.match(source) is not None and not source.startswith((".", "/"))


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
