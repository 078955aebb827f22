"""Prompts name columns in braces, and tasks with a prompt have choices."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from restitch.registry.specs.data import DataSpec
from restitch.registry.specs.prompt import fill_in, prompt_columns
from restitch.registry.specs.task import TaskSpec


@pytest.mark.parametrize(
    ("prompt", "columns", "filled"),
    [
        ("Question: {text}\nAnswer:", ("text",), "Question: <text>\nAnswer:"),
        ("{a}{b}{a}", ("a", "b"), "<a><b><a>"),
        ("{{json}}: {a b.c!r:3}", ("a b.c!r:3",), "{json}: <a b.c!r:3>"),
        ("{{{a}}}", ("a",), "{<a>}"),
    ],
)
def test_names_in_braces_are_columns(prompt: str, columns: tuple[str, ...], filled: str) -> None:
    assert prompt_columns(prompt) == columns
    assert fill_in(prompt, {name: f"<{name}>" for name in columns}) == filled


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("Question:", "names no column"),
        ("{{text}}", "names no column"),
        ("{}", "at character 0"),
        ("a {text", "'{' at character 2"),
        ("{text} }", "'}' at character 7"),
    ],
)
def test_a_prompt_without_a_column_or_with_a_lone_brace_is_refused(
    prompt: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prompt_columns(prompt)


@given(st.text(), st.text())
def test_values_are_never_read_as_columns(before: str, value: str) -> None:
    escaped = before.replace("{", "{{").replace("}", "}}")
    assert fill_in(escaped + "{a}", {"a": value}) == before + value


ANSWER = {"choices": None, "answer": "a", "metric": "exact_match"}


def task(**changes: Any) -> TaskSpec:
    values = {"task": "t", "prompt": "Q {text}\nA", "choices": ["no", "yes"], **changes}
    return TaskSpec.model_validate({k: v for k, v in values.items() if v is not None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "'choices' needs 'prompt'"),
        ({"prompt": None, "choices": None, "score": "per_token"}, "'score' needs 'prompt'"),
        ({"choices": None}, "needs one of 'choices', 'choices_column' and 'answer'"),
        ({"choices_column": "options"}, "needs one of 'choices', 'choices_column' and 'answer'"),
        ({"choices": ["no"]}, "at least two choices"),
        ({"choices": ["no", "yes", "no"]}, "choices occur twice: 'no'"),
        ({"choices": ["no", " "]}, "a choice is empty"),
        ({"prompt": "Q"}, "names no column"),
        ({"head": {"labels": ["a", "b"]}}, "has no 'head'"),
        ({"scale": 2}, "has no 'scale'"),
        ({"data": {"path": "p", "input": "other"}}, "leave out 'data.input'"),
        ({"choices": None, "choices_column": "c", "metric": "f1"}, "needs 'choices'"),
        (
            {"answer": "a", "metric": "exact_match"},
            "needs one of 'choices', 'choices_column' and 'answer'",
        ),
        ({"generate": {}}, "'generate' needs 'answer'"),
        ({"metric": "exact_match"}, "metric 'exact_match' and 'answer' belong together"),
        (
            {"choices": None, "answer": "a", "metric": "accuracy"},
            "metric 'exact_match' and 'answer' belong together",
        ),
        (
            {**ANSWER, "data": {"path": "p", "label": "b"}},
            "leave out 'data.label'",
        ),
        (
            {**ANSWER, "generate": {"extract": "("}},
            "not a regular expression",
        ),
        ({**ANSWER, "generate": {"max_new_tokens": 0}}, "greater than or"),
        ({"metric": "perplexity"}, "scores whole texts: leave out 'prompt'"),
        ({"per": "word"}, "'per' is the unit of 'metric: perplexity'"),
        ({"expected": 2.0, "data": {"path": "p", "test": "t"}}, "is a value of accuracy"),
        (
            {"choices": None, "choices_column": "c", "data": {"path": "p", "classes": ["a", "b"]}},
            "'data.classes' needs 'choices'",
        ),
    ],
)
def test_a_question_that_cannot_be_answered_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        task(**changes)


def test_the_prompt_names_the_input_columns() -> None:
    spec = task(prompt="{a} or {b}", data={"path": "p", "test": "t"})
    assert spec.rows_spec.input == ("a", "b")
    assert task(prompt="{a}", data={"path": "p", "input": "a"}).rows_spec.input == ("a",)
    plain = TaskSpec(task="t", data=DataSpec(path="p", input=("x",)))
    assert plain.rows_spec == plain.data


def test_all_of_a_question_is_part_of_its_head() -> None:
    spec = task(score="per_token", max_length=9)
    head = spec.head_spec
    assert (head.prompt, head.labels, head.score, head.max_length) == (
        "Q {text}\nA",
        ("no", "yes"),
        "per_token",
        9,
    )
    own = task(choices=None, choices_column="c").head_spec
    assert (own.labels, own.choices_column) == (None, "c")


def test_a_task_without_a_prompt_has_the_digest_of_before() -> None:
    spec = TaskSpec.model_validate({"task": "t", "head": {"labels": ["a", "b"]}})
    assert spec.digest == "a71de077991fe8ba3583b9648413704d98d9ddad3a5291d403015005b2fb49dd"
