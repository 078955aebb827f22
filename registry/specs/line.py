"""The keys of a line file: its base, how models join it, and what it must keep.

A spec made from a file (`registry.specs.files`) is resolved: it means the same when the file,
its folder or our defaults change.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from restitch.merging.errors import BadInput
from restitch.registry.specs.base import InFile, Spec, Text
from restitch.registry.specs.gates import GatesSpec
from restitch.registry.specs.hub_id import keep_pin
from restitch.registry.specs.localize import LocalizeSpec
from restitch.registry.specs.method import AnyMethod, MethodSpec, TournamentSpec
from restitch.registry.specs.name import Name
from restitch.registry.specs.task import TaskSpec

DEFAULT_CRON = "*/15 * * * *"
DEFAULT_TIMEZONE = "UTC"

# Keys of a line that cannot change: its masks belong to them.
_FIXED = ("line", "base", "family", "space")

# Five fields, or a word such as @daily. What is in the fields is for Prefect's parser, which
# `tasks.runtime.schedules` asks before a line is made or changed.
_CRON = re.compile(r"@[a-z]+|[0-9A-Za-z*/,#?-]+( [0-9A-Za-z*/,#?-]+){4}", re.ASCII)

# `drop`: promoted although a task lost significantly. `crashes`: the third death of a worker at
# the same work.
NotifyEvent = Literal[
    "promoted", "rejected", "held", "quarantined", "rolled-back", "drop", "crashes"
]

ComputeType = Literal["float32", "bfloat16"]
Compute = Literal["auto"] | ComputeType

Actors = Annotated[tuple[Text, ...], Field(min_length=1)]


class ActorsSpec(Spec):
    """Who may make which decision by hand; without a list anyone may.

    In a file, one list in place of the keys stands for all of them.
    """

    promote: Actors | None = None
    """Who may promote a version."""
    rollback: Actors | None = None
    """Who may roll back the champion."""
    retire: Actors | None = None
    """Who may retire a model."""
    restore: Actors | None = None
    """Who may restore a retired model."""
    pin: Actors | None = None
    """Who may pin the champion."""
    unpin: Actors | None = None
    """Who may unpin the champion."""
    pause: Actors | None = None
    """Who may pause the line or its schedule."""
    resume: Actors | None = None
    """Who may resume a paused line."""
    forget: Actors | None = None
    """Who may forget a model, and purge it."""
    drop: Actors | None = None
    """Who may drop the line, and purge it."""

    def of(self, decision: str) -> tuple[str, ...] | None:
        """Those who may make a decision; None is anyone."""
        names: tuple[str, ...] | None = getattr(self, decision)
        return names


class ScheduleSpec(Spec):
    """When a line is remerged without an event."""

    cron: str = Field(examples=["0 3 * * *"])
    """Five fields (minute, hour, day of the month, month, day of the week), or a word such as
    `@daily`."""
    timezone: Text = Field(default=DEFAULT_TIMEZONE, examples=["Europe/Berlin"])
    """The time zone of the cron line."""

    @field_validator("cron")
    @classmethod
    def _cron_line(cls, value: str) -> str:
        line = " ".join(value.split())
        if not _CRON.fullmatch(line):
            raise ValueError(f"{value[:60]!r} is not a cron line such as {DEFAULT_CRON!r}")
        return line

    def __str__(self) -> str:
        """The cron line with its time zone."""
        return f"{self.cron} {self.timezone}"


class SpaceSpec(Spec):
    """The vectors of (IA)³ adapters, which a line merges in place of weights.

    The keys are those of PEFT's `IA3Config`; all adapters of the line have the same.
    """

    target_modules: Annotated[tuple[Text, ...], Field(min_length=1)] = Field(
        examples=[["k", "v", "wo"]]
    )
    """The modules with a vector: their names, or the ends of their names after a dot."""
    feedforward_modules: tuple[Text, ...] = Field(default=(), examples=[["wo"]])
    """Those of them whose inputs are scaled; the others scale their outputs."""


class MlflowSpec(Spec):
    """What MLflow holds of merged versions."""

    weights: Literal["champion", "all", "none"] = "champion"
    """The versions whose weights lie in MLflow, where `mlflow.transformers.load_model` finds them
    without restitch: the `champion` in use, `all` versions, or `none`. `mlflow.pyfunc.load_model`
    loads every version in any case, from the store."""


class LineSpec(Spec):
    """A line: its base, how models join it, and what it must keep."""

    line: Name = Field(examples=["photos"])
    """The name of the line: 1 to 63 of a-z, 0-9, `_` and `-`."""
    base: Text = Field(examples=["models/base", "owner/name", "s3://bucket/models/base"])
    """The pretrained checkpoint that all models were finetuned from: a folder, an address, or a hub
    id (`owner/name[@commit]`); it cannot change."""
    family: Text = Field(examples=["text-encoder", "clip"])
    """The kind of model, which says how it loads and scores; it cannot change. A line file without
    it is answered with the family that fits the base."""
    method: AnyMethod = Field(
        examples=["localize-and-stitch", {"name": "ties", "settings": {"density": 0.2}}]
    )
    """The merge method: a name, a name with settings, or a tournament of several."""
    localize: Annotated[LocalizeSpec, InFile(LocalizeSpec | None)] = Field(
        default=LocalizeSpec(), examples=[{"mode": "dataless", "density": 0.05}]
    )
    """How masks are found; a method that needs whole task vectors defaults to `{mode: dataless,
    density: 1}`."""
    space: Literal["adapter"] | SpaceSpec | None = Field(
        default=None,
        examples=["adapter", {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]}],
    )
    """For a line of (IA)³ adapters: merge their vectors, in place of the weights of the models. The
    modules that have vectors, or `adapter` for PEFT's default modules of the base's architecture;
    it cannot change."""
    retention: Annotated[TaskSpec | Name | None, InFile(Text | TaskSpec | None)] = Field(
        default=None, examples=["tasks/imagenet.yaml"]
    )
    """The general benchmark, on which retention is measured: a task file, the name of a task of the
    line, or the keys of a task."""
    gates: Annotated[GatesSpec, InFile(GatesSpec | None)] = Field(
        default=GatesSpec(), examples=[{"max_task_drop": 0.01}]
    )
    """What a merged version must reach to be promoted."""
    schedule: Annotated[ScheduleSpec | None, InFile(Text | ScheduleSpec | None)] = Field(
        default=ScheduleSpec(cron=DEFAULT_CRON),
        examples=["0 3 * * *", {"cron": "0 3 * * *", "timezone": "Europe/Berlin"}],
    )
    """When to remerge without an event: a cron line in UTC, or a cron line with its time zone. By
    default every 15 minutes; `null` is no schedule."""
    require_device: Literal["cpu", "cuda"] | None = None
    """Only workers with this device work on the line."""
    compute: Compute = "auto"
    """The type of the weights when a model is evaluated, or localized with data: `float32`, or
    `bfloat16` for half the memory; merging is not affected. `auto` is `bfloat16` on a GPU that has
    it if all weights of the base are stored in it, else `float32`."""
    actors: ActorsSpec | None = Field(
        default=None, examples=[["alice", "bob"], {"promote": ["alice"]}]
    )
    """Who may promote, roll back, retire, restore, pin, unpin, pause and resume by hand: a list for
    each decision, or one list for all; by default anyone."""

    mlflow: Annotated[MlflowSpec, InFile(MlflowSpec | None)] = Field(
        default=MlflowSpec(), examples=[{"weights": "none"}]
    )
    """What MLflow holds of merged versions; by default the weights of the champion."""
    notify: tuple[NotifyEvent, ...] = Field(
        default=(), examples=[["rejected", "held", "quarantined", "drop", "crashes"]]
    )
    """What to notify people of, at the addresses in `RESTITCH_NOTIFY_URLS`."""

    @model_validator(mode="after")
    def _vectors_have_masks_without_data(self) -> Self:
        if self.space is not None and self.localize.mode != "dataless":
            raise ValueError(
                f"a line with a space keeps the vectors of adapters: localize: mode is "
                f"{self.localize.mode}, give dataless"
            )
        return self

    @field_validator("actors", mode="before", json_schema_input_type=list[Text] | ActorsSpec | None)
    @classmethod
    def _same_for_all(cls, value: Any) -> Any:
        given = dict.fromkeys(ActorsSpec.model_fields, value) if isinstance(value, list) else value
        if not isinstance(given, dict):
            return given
        return {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}

    @field_validator("method", mode="before")
    @classmethod
    def _method_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("schedule", mode="before")
    @classmethod
    def _cron_alone(cls, value: Any) -> Any:
        return {"cron": value} if isinstance(value, str) else value

    def with_method_settings(self, settings: dict[str, Any]) -> "LineSpec":
        """Return the same line with other settings of its method."""
        return self.with_method(MethodSpec(name=self.method.name, settings=settings))

    def with_method(self, method: MethodSpec | TournamentSpec) -> "LineSpec":
        """Return the same line with another method."""
        return self.model_copy(update={"method": method})

    def with_base(self, base: str) -> "LineSpec":
        """Return the same line with a pinned base."""
        return self.model_copy(update={"base": base})

    def with_space(self, space: SpaceSpec) -> "LineSpec":
        """Return the same line with the modules of its space named."""
        return self.model_copy(update={"space": space})

    def with_retention(self, retention: TaskSpec | str | None) -> "LineSpec":
        """Return the same line with another benchmark, such as one whose data is pinned."""
        return self.model_copy(update={"retention": retention})

    def with_pins_of(self, old: "LineSpec") -> "LineSpec":
        """Pin unpinned sources to the commits that the old spec pinned."""
        new = self.with_base(keep_pin(self.base, old.base))
        if isinstance(new.retention, TaskSpec) and isinstance(old.retention, TaskSpec):
            new = new.with_retention(new.retention.with_pins_of(old.retention))
        return new


def line_changes(old: LineSpec, new: LineSpec) -> list[tuple[str, JsonValue, JsonValue]]:
    """List the changes to an existing line as (key, old value, new value).

    Raises:
        BadInput: a key changes that must not.
    """
    changes = _differences(old.to_json(), new.to_json())
    fixed = [change for change in changes if change[0].partition(".")[0] in _FIXED]
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
    changes: list[tuple[str, JsonValue, JsonValue]] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if all(isinstance(value, dict | None) for value in (before, after)):
            changes.extend(_differences(before or {}, after or {}, f"{prefix}{key}."))
        elif before != after:
            changes.append((f"{prefix}{key}", before, after))
    return changes
