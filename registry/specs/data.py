"""The key `data` of a task file: where a task's rows are.

A path is absolute; any other source is an address or a hub id, pinned as `owner/name@commit`
once it is resolved.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, JsonValue, field_validator, model_validator

from restitch.registry.specs.base import Count, InFile, Spec, Text

Modality = Literal["text", "image"]


def _as_text(value: Any) -> Any:
    return str(value) if type(value) in (int, float) else value


class SampleSpec(Spec):
    """Some of the rows that a task is evaluated on; each class has its share of them."""

    rows: Count = Field(examples=[1000])
    """How many rows, or all where there are fewer."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seeds the choice of rows; the same seed always gives the same."""


class DataSpec(Spec):
    """Where a task's rows are."""

    path: Text = Field(examples=["data/pets", "owner/name"])
    """A folder, or a data set on the hub, `owner/name[:config][@commit]`; registration pins the
    commit."""
    train: Text | None = Field(default=None, examples=["train.jsonl"])
    """The rows to calibrate masks and methods with: a file or folder in `path`, or the name of a
    split."""
    validation: Text | None = Field(default=None, examples=["validation.jsonl"])
    """The rows to tune on: a file or folder in `path`, or the name of a split; by default a part of
    `train`, set apart."""
    holdout: Annotated[float, Field(gt=0, lt=1)] | None = Field(default=None, examples=[0.1])
    """The share of each class of `train` that is set apart to tune on, in place of `validation`; by
    default a fifth, and at most 1000 rows together. The rows are drawn with seed 0."""
    test: Text | None = Field(default=None, examples=["test.jsonl"])
    """The rows to report on: a file or folder in `path`, or the name of a split; by default the
    validation rows."""
    input: Annotated[tuple[Text, ...], InFile(Text | list[Text])] = Field(
        default=(), examples=["text", ["question", "answer"]]
    )
    """The column with the input, or two columns for sentence pairs; by default `text` or `image`,
    as the family reads."""
    label: Text | None = Field(default=None, examples=["label"])
    """The column with the class: an index, or one of the labels; by default `label`. With `metric:
    squared_error` it has a number."""
    classes: Annotated[tuple[Text, ...] | None, InFile(list[Text] | None)] = Field(
        default=None, examples=[["neg", "pos"]]
    )
    """The names of the classes in the label column, in the order of `head: labels` or `choices`; by
    default the classes themselves, in any order and case."""
    unlabelled: Annotated[
        str | None, BeforeValidator(_as_text), InFile(int | float | str | None)
    ] = Field(default=None, examples=[-1])
    """The value in the label column of rows that have no label, such as -1, or `""` where it is
    empty. These rows are left out and counted; by default they are an error."""
    delimiter: Annotated[str, Field(pattern=r'^[^"\r\n]$')] | None = Field(
        default=None, examples=[";"]
    )
    """The character between two fields of a CSV or TSV file; by default a comma or a tab."""
    quotes: bool | None = None
    """Whether the fields of CSV and TSV files are quoted; by default CSV is, and TSV only if all of
    the file is written with quotes."""
    sample: Annotated[SampleSpec | None, InFile(Count | SampleSpec | None)] = Field(
        default=None, examples=[1000]
    )
    """Evaluate on this many rows only, the same ones every time; by default on all."""
    content: dict[str, JsonValue] | None = None
    """The digests of the files behind the rows; registration fills it in, and rows are compared
    with it before use."""
    left_out: dict[str, int] | None = None
    """The number of rows of each split that `unlabelled` leaves out; registration fills it in."""

    @field_validator("sample", mode="before")
    @classmethod
    def _rows_alone(cls, value: Any) -> Any:
        return {"rows": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("classes", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("input", mode="before")
    @classmethod
    def _one_column(cls, value: Any) -> Any:
        if isinstance(value, str):
            return (value,)
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _holdout_is_of_train(self) -> Self:
        if self.holdout is not None and (self.train is None or self.validation is not None):
            raise ValueError("'holdout' is a part of 'train', in place of 'validation'")
        return self

    def source(self, split: str) -> str | None:
        """The file, folder or split behind `train`, `validation` or `test`."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[split]

    @property
    def evaluation_split(self) -> str | None:
        """The split to report results on: test if given, else validation."""
        if self.test is not None:
            return "test"
        return "validation" if self.validation or self.train else None

    def with_columns(self, modality: Modality) -> "DataSpec":
        """Fill in the columns that the file leaves out: `text` or `image`, and `label`."""
        return self.model_copy(
            update={"input": self.input or (modality,), "label": self.label or "label"}
        )
