"""What a user describes as a task: its rows, its classes, its measure."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    field_validator,
    model_validator,
)

from restitch.registry.specs.base import Spec, Text

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}\Z")


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?(@[\w./-]+)?\Z", re.ASCII)


_PIN = re.compile(r"@[0-9a-f]{40}\Z")


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


# The tags keep pydantic from reporting what is wrong with the other choice.
Texts = Annotated[
    Annotated[tuple[Text, ...], Tag("as list")] | Annotated[Literal["openai"], Tag("as word")],
    Discriminator(lambda value: "as word" if isinstance(value, str) else "as list"),
]


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
