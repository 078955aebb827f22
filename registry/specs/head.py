"""How a task's rows are scored: its classes, the answers that a model generates, and its head."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    field_validator,
    model_serializer,
    model_validator,
)

from restitch.registry.specs.base import Count, InFile, Spec, Text

Score = Literal["sum", "per_token", "per_character"]
TextUnit = Literal["word", "byte"]

# The tags keep pydantic from reporting what is wrong with the other choice.
Texts = Annotated[
    Annotated[tuple[Text, ...], Tag("as list")] | Annotated[Literal["openai"], Tag("as word")],
    Discriminator(lambda value: "as word" if isinstance(value, str) else "as list"),
    InFile(Text | list[Text]),
]
Scale = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
MaxLength = Count

# Left out of what is stored, and so of digests, where they are not used.
_GENERATE_KEYS = ("extract_last", "ignore", "ignore_case", "ignore_punctuation")


class GenerateSpec(Spec):
    """How an answer is generated and compared; always greedily."""

    max_new_tokens: Count = 64
    """The most tokens of an answer."""
    stop: Annotated[tuple[Text, ...], InFile(Text | list[Text])] = Field(
        default=("\n",), examples=[["\n", "Question:"]]
    )
    """Texts that end an answer; they do not belong to it. The model's own end of text ends it,
    too."""
    extract: Text | None = Field(default=None, examples=["#### (-?[0-9.,]+)"])
    """A regular expression for the part that is compared: its first group with text, or else all of
    it, where it first matches. A generated text without a match is wrong."""
    extract_last: bool | None = None
    """Extract where `extract` matches last, in place of first."""
    ignore: Annotated[tuple[Text, ...] | None, InFile(Text | list[Text] | None)] = Field(
        default=None, examples=[[",", "\\$"]]
    )
    """Regular expressions; what they match, in a generated text or in an answer, does not count."""
    ignore_case: bool | None = None
    """Upper and lower case are the same."""
    ignore_punctuation: bool | None = None
    """Punctuation marks of ASCII do not count."""

    @field_validator("stop", mode="before")
    @classmethod
    def _one_text(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else tuple(value or ())

    @field_validator("ignore", mode="before")
    @classmethod
    def _one_pattern(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else tuple(value or ()) or None

    @field_validator("extract", "ignore")
    @classmethod
    def _compiles(cls, value: Any) -> Any:
        try:
            for pattern in (value,) if isinstance(value, str) else value or ():
                re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return value

    @field_validator("extract_last", "ignore_case", "ignore_punctuation")
    @classmethod
    def _only_if_it_is_used(cls, value: bool | None) -> bool | None:
        return value or None

    @model_validator(mode="after")
    def _something_to_extract(self) -> Self:
        if self.extract_last and self.extract is None:
            raise ValueError("'extract_last' needs 'extract', a regular expression")
        return self

    @model_serializer(mode="wrap")
    def _used_keys(self, all_keys: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out optional keys that are not used: files from before they existed stay valid."""
        values: dict[str, Any] = all_keys(self)
        return {k: v for k, v in values.items() if v is not None or k not in _GENERATE_KEYS}


class ClassesSpec(Spec):
    """How a task's classes are described."""

    labels: Texts | None = Field(default=None, examples=[["negative", "positive"], "labels.txt"])
    """The classes in the order of their indices: a list, a file with one per line or a JSON list,
    or `openai` for the 1000 curated ImageNet names. A classifier's own are matched by name."""
    templates: Texts = Field(default=("{}",), examples=[["a photo of a {}."]])
    """Prompts with `{}` in place of the label: a list, a file, or `openai` for the 80 prompts of
    CLIP."""
    labels_from: Literal["dataset"] | None = None
    """`dataset` takes the names of the classes from the data set, instead of `labels`."""

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if not self._needs_labels():
            return self
        if (self.labels is None) == (self.labels_from is None):
            raise ValueError("give either 'labels' or 'labels_from: dataset'")
        if self.labels == ():
            raise ValueError("a head needs labels")
        if isinstance(self.templates, tuple):
            if not self.templates:
                raise ValueError("a head needs at least one template, for instance '{}'")
            for template in self.templates:
                if "{}" not in template:
                    raise ValueError(f"template {template!r} has no '{{}}' for the label")
        return self

    def _needs_labels(self) -> bool:
        """True unless each row has classes of its own."""
        return True

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels, where they are listed."""
        assert isinstance(self.labels, tuple)
        return self.labels

    def prompts(self) -> list[str]:
        """All prompts, the templates of the first label first."""
        assert isinstance(self.templates, tuple)
        return [text.replace("{}", label) for label in self.classes for text in self.templates]


class HeadSpec(ClassesSpec):
    """The whole description of a head: the classes, how they are scored, and the text length.

    A head with a prompt scores answers: its labels are the choices, unless each row has its own, or
    one answer that the model generates. A head `of_text` has no classes: it scores whole texts. A
    head `of_number` gives one number. An answer that is `apart` needs no room behind its prompt.
    """

    scale: Scale | None = None
    max_length: MaxLength | None = None
    prompt: Text | None = None
    chat: bool | None = None
    choices_column: Text | None = None
    score: Score | None = None
    answer: Text | None = None
    generate: GenerateSpec | None = None
    of_text: bool | None = None
    per: TextUnit | None = None
    of_number: bool | None = None
    apart: bool | None = None

    def _needs_labels(self) -> bool:
        return not (self.choices_column or self.answer or self.of_text or self.of_number)

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels, where they are listed; none for a number."""
        return () if self.of_number else super().classes

    @property
    def most_read(self) -> int | None:
        """The most tokens of a prompt: a generated answer may need room behind it."""
        if self.max_length is None or self.generate is None or self.apart:
            return self.max_length
        return self.max_length - self.generate.max_new_tokens


def check_choices(choices: tuple[str, ...]) -> None:
    """Refuse answers that nobody can choose between.

    Raises:
        ValueError: there are fewer than two, one is empty, or two are equal.
    """
    if len(choices) < 2:
        raise ValueError(f"a question needs at least two choices, not {len(choices)}")
    if any(not choice.strip() for choice in choices):
        raise ValueError("a choice is empty: every answer needs a text")
    twice = sorted({choice for choice in choices if choices.count(choice) > 1})
    if twice:
        raise ValueError(f"choices occur twice: {', '.join(map(repr, twice[:5]))}")
