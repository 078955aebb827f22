"""The keys of a task file: its rows, its head or its prompt, its metric."""

from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from restitch.registry.specs.base import InFile, Spec, Text
from restitch.registry.specs.data import DataSpec
from restitch.registry.specs.head import (
    ClassesSpec,
    GenerateSpec,
    HeadSpec,
    MaxLength,
    Scale,
    Score,
    TextUnit,
    check_choices,
)
from restitch.registry.specs.hub_id import keep_pin
from restitch.registry.specs.metric import METRICS, MetricName
from restitch.registry.specs.name import Name
from restitch.registry.specs.prompt import MASK, prompt_columns

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
