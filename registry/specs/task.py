"""The keys of a task file: its rows, its head or its prompt, its metric.

A path is absolute; any other source is an address or a hub id, pinned as `owner/name@commit`
once it is resolved.
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

from restitch.registry.specs.base import Count, InFile, Spec, Text
from restitch.registry.specs.metric import METRICS, MetricName
from restitch.registry.specs.prompt import MASK, prompt_columns

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}\Z")


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?(@[\w./-]+)?\Z", re.ASCII)


_PIN = re.compile(r"@[0-9a-f]{40}\Z")


def check_name(name: str) -> str:
    """Return the name of a line or a task.

    Raises:
        ValueError: it is not a valid name.
    """
    if not NAME.match(name):
        raise ValueError(
            f"{name[:80]!r} is not a name: use 1 to 63 of a-z, 0-9, '_' and '-', "
            "starting with a letter or digit"
        )
    return name


Name = Annotated[
    str,
    BeforeValidator(
        lambda value: check_name(value) if isinstance(value, str) else value,
        json_schema_input_type=Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")],
    ),
]


Score = Literal["sum", "per_token", "per_character"]
TextUnit = Literal["word", "byte"]
Modality = Literal["text", "image"]


# The tags keep pydantic from reporting what is wrong with the other choice.
Texts = Annotated[
    Annotated[tuple[Text, ...], Tag("as list")] | Annotated[Literal["openai"], Tag("as word")],
    Discriminator(lambda value: "as word" if isinstance(value, str) else "as list"),
    InFile(Text | list[Text]),
]


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


_ANSWERS = ("choices", "choices_column", "answer")
# Left out of the digests of tasks and heads that do not use them.
PROMPT_KEYS = (
    *("prompt", "chat", *_ANSWERS, "score", "generate"),
    *("of_text", "per", "of_number", "apart", "lm_eval"),
)


class TaskSpec(Spec):
    """One skill: its rows, its head or its prompt, its metric."""

    task: Name = Field(examples=["pets"])
    """The name of the task: 1 to 63 of a-z, 0-9, `_` and `-`."""
    data: DataSpec | None = None
    """The rows of the task; without them its models are localized without data and not
    evaluated."""
    head: ClassesSpec | None = None
    """How the classes are described; required with `data`, except in a line of language models. A
    task of classifiers may leave it out: the classes are those of its finetuned model."""
    prompt: Text | None = Field(default=None, examples=["Question: {text}\nAnswer type:"])
    """The text that a language model answers, with names of columns in braces; `{{` is a brace of
    the text. Required with `data` in a line of language models."""
    chat: bool | None = None
    """Ask the prompt as a turn of the user, by the chat template of the base's tokenizer; by
    default the prompt is read as it is."""
    choices: Annotated[tuple[Text, ...] | None, InFile(list[Text] | None)] = Field(
        default=None, examples=[["description", "entity", "person"]]
    )
    """The answers to choose from, in the order of their indices; the label column has the index or
    the answer."""
    choices_column: Text | None = Field(default=None, examples=["options"])
    """The column with a list of answers in each row, in place of `choices`; the label is an index
    into it or one of its texts, or a list of them if several are right."""
    answer: Text | None = Field(default=None, examples=["answer"])
    """The column with the right answer, or with a list of them, in place of `choices`: the model
    generates a text after the prompt, and `metric: exact_match` compares it with each answer."""
    generate: GenerateSpec | None = None
    """How an answer is generated and compared; only with `answer`."""
    lm_eval: Text | None = Field(default=None, examples=["arc_easy", "tasks/arc.yaml"])
    """A task of lm-eval in place of `data`, `prompt` and what answers it: its name, or a file in
    its format; needs `restitch[lm-eval]`. Registration reads its rows once and keeps them. By
    default choices are compared as its metric `acc` or `acc_norm` does."""
    score: Score = "sum"
    """How answers are compared: by the `sum` of the log-probabilities of their tokens, or by the
    sum `per_token` or `per_character` of the answer."""
    per: TextUnit | None = Field(default=None, examples=["word"])
    """The unit of a perplexity: a `word`, which ends at white space, or a `byte` of UTF-8; by
    default a token, with which models of other tokenizers cannot be compared."""
    scale: Scale | None = Field(default=None, examples=[20.0])
    """The factor of the cosines in the scores; by default the family's own."""
    max_length: MaxLength | None = Field(default=None, examples=[128])
    """Tokens per text; by default as many as the model reads."""
    metric: MetricName = "accuracy"
    """`accuracy`, or `f1`: of class 1 where there are two, else the mean over the classes. With
    `answer`: `exact_match`, which is its default. `perplexity` scores whole texts, without labels.
    `squared_error` compares numbers: the label column has a number, and the classifier one output.
    See the page about metrics."""
    expected: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        default=None, examples=[0.91]
    )
    """The value of the metric that the model's author measured; a model whose 95 % interval does
    not contain it is reported."""

    @field_validator("choices", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("chat")
    @classmethod
    def _only_if_it_is_used(cls, value: bool | None) -> bool | None:
        return value or None

    @field_validator("choices")
    @classmethod
    def _choices_differ(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None:
            check_choices(value)
        return value

    @field_validator("head")
    @classmethod
    def _labels_differ(cls, value: ClassesSpec | None) -> ClassesSpec | None:
        labels = () if value is None or not isinstance(value.labels, tuple) else value.labels
        if len(labels) == 1:
            raise ValueError("a head needs at least two labels")
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"labels occur twice: {', '.join(map(repr, twice[:5]))}")
        return value

    @model_validator(mode="after")
    def _expected_can_be_compared(self) -> Self:
        measured = self.lm_eval or (self.data is not None and self.data.evaluation_split)
        if self.expected is not None and not measured:
            raise ValueError("'expected' needs 'data' with rows to measure the model on")
        a_share = METRICS[self.metric].is_share and self.lm_eval is None
        if self.expected is not None and self.expected > 1 and a_share:
            raise ValueError(f"'expected' is a value of {self.metric}, from 0 to 1")
        return self

    @model_validator(mode="after")
    def _metric_fits(self) -> Self:
        if self.is_of_text:
            given = [n for n in ("head", "prompt", "scale", *_ANSWERS) if getattr(self, n)]
            if given:
                raise ValueError(
                    f"metric '{self.metric}' scores whole texts: leave out '{given[0]}'"
                )
            if self.data is not None and self.data.unlabelled is not None:
                raise ValueError(
                    f"leave out 'data.unlabelled': metric '{self.metric}' needs no labels"
                )
        elif self.per is not None:
            raise ValueError("'per' is the unit of 'metric: perplexity'")
        if (self.metric == "exact_match") != (self.answer is not None):
            raise ValueError("metric 'exact_match' and 'answer' belong together")
        if self.generate is not None and self.answer is None:
            raise ValueError("'generate' needs 'answer', the column with the right answer")
        return self

    @model_validator(mode="after")
    def _lm_eval_brings_its_rows(self) -> Self:
        registered = self.data is not None and self.data.content is not None
        if self.lm_eval is None or registered:
            return self
        for name in ("data", "head", "prompt", "chat", *_ANSWERS, "generate", "scale", "per"):
            if getattr(self, name) is not None:
                raise ValueError(f"leave out '{name}': the rows of 'lm_eval' have their own")
        if self.metric != "accuracy":
            raise ValueError("leave out 'metric': a task of 'lm_eval' has its own")
        return self

    @model_validator(mode="after")
    def _prompt_can_be_answered(self) -> Self:
        if self.prompt is None and self.lm_eval is not None:
            return self
        if self.prompt is None:
            given = [name for name in _ANSWERS if getattr(self, name) is not None]
            given += ["score"] if self.score != "sum" else []
            given += ["chat"] if self.chat else []
            if given:
                raise ValueError(f"'{given[0]}' needs 'prompt', which it answers")
            return self
        columns = prompt_columns(self.prompt)
        for name in ("head", "scale"):
            if getattr(self, name) is not None:
                raise ValueError(f"a task with 'prompt' has no '{name}': its classes are 'choices'")
        if sum(getattr(self, name) is not None for name in _ANSWERS) != 1:
            raise ValueError(
                "a task with 'prompt' needs one of 'choices', 'choices_column' and 'answer'"
            )
        without_mask = tuple(name for name in columns if name != MASK)
        if self.data is not None and self.data.input not in ((), columns, without_mask):
            raise ValueError("leave out 'data.input': the prompt names the columns that are read")
        if self.choices_column is not None and self.metric != "accuracy":
            raise ValueError(f"metric '{self.metric}' needs 'choices', the same for all rows")
        if self.choices is None and self.data is not None and self.data.classes is not None:
            raise ValueError("'data.classes' needs 'choices', the same for all rows")
        label = None if self.data is None else self.data.label
        if self.answer is not None and label not in (None, self.answer):
            raise ValueError("leave out 'data.label': 'answer' names the column that is compared")
        return self

    @model_validator(mode="after")
    def _numbers_have_no_classes(self) -> Self:
        if not self.is_of_numbers:
            return self
        for name in ("head", "prompt", "scale"):
            if getattr(self, name) is not None:
                raise ValueError(f"leave out '{name}': metric '{self.metric}' compares numbers")
        if self.data is not None and self.data.classes is not None:
            raise ValueError(f"leave out 'data.classes': metric '{self.metric}' compares numbers")
        return self

    @property
    def has_head(self) -> bool:
        """True if the task says how rows are scored."""
        return self.uses_head or self.prompt is not None or self.is_of_text

    @property
    def uses_head(self) -> bool:
        """True if rows are scored by a head, which gives classes or a number."""
        return self.head is not None or self.is_of_numbers

    @property
    def is_of_numbers(self) -> bool:
        """True if the head gives a number, which is compared with the one of the row."""
        return self.metric == "squared_error"

    @property
    def is_of_text(self) -> bool:
        """True if whole texts are scored: there are no classes and no labels."""
        return self.metric == "perplexity"

    @property
    def rows_spec(self) -> DataSpec:
        """Where the rows are, with the columns of the prompt as input; for a task with data."""
        assert self.data is not None
        if self.prompt is None:
            return self.data
        label = self.data.label if self.answer is None else self.answer
        return self.data.model_copy(update={"input": prompt_columns(self.prompt), "label": label})

    @property
    def head_spec(self) -> HeadSpec:
        """The whole description of the task's head; only for a task that has one."""
        if self.is_of_text:
            return HeadSpec(max_length=self.max_length, of_text=True, per=self.per)
        if self.is_of_numbers:
            return HeadSpec(max_length=self.max_length, of_number=True)
        if self.prompt is not None:
            return HeadSpec(
                labels=self.choices,
                max_length=self.max_length,
                prompt=self.prompt,
                chat=self.chat,
                choices_column=self.choices_column,
                score=self.score,
                answer=self.answer,
                generate=None if self.answer is None else self.generate or GenerateSpec(),
            )
        assert self.head is not None
        classes = {name: getattr(self.head, name) for name in ClassesSpec.model_fields}
        return HeadSpec(**classes, scale=self.scale, max_length=self.max_length)

    def without_expected(self) -> "TaskSpec":
        """Return the same task without the value of one model."""
        return self.model_copy(update={"expected": None})

    def with_pins_of(self, old: "TaskSpec") -> "TaskSpec":
        """Pin unpinned data to the commit that the old spec pinned."""
        if self.data is None or old.data is None:
            return self
        path = keep_pin(self.data.path, old.data.path)
        return self.model_copy(update={"data": self.data.model_copy(update={"path": path})})


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


def keep_pin(new: str, old: str) -> str:
    """Return the old source if the new one is the same without the pinned commit."""
    return old if _PIN.sub("", old) == new else new


def split_pin(source: str) -> tuple[str, str | None]:
    """Split a hub id into the id and its revision; a path is never split."""
    if source.startswith("/"):
        return source, None
    name, _, revision = source.partition("@")
    return name, revision or None


def is_hub_id(source: str) -> bool:
    """True if the source has the form of a hub id."""
    return _HUB_ID.match(source) is not None and not source.startswith((".", "/"))
