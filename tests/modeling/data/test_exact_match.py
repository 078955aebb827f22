"""Generated texts next to the right answers."""

from typing import Any

import pytest

from restitch.modeling.data.exact_match import is_match
from restitch.registry.specs.head import GenerateSpec

NUMBER = {"extract": r"\d+"}
SIGNED = {"extract": r"#### (\d+)"}


@pytest.mark.parametrize(
    ("text", "answer", "keys", "expected"),
    [
        (" 42 ", "42\n", {}, True),
        ("42.", "42", {}, False),
        ("Yes", "yes", {}, False),
        ("it is 42, so 42", "42", NUMBER, True),
        ("so\n#### 42", "6 x 7\n#### 42", SIGNED, True),
        ("so\n#### 43", "6 x 7\n#### 42", SIGNED, False),
        ("no number", "42", NUMBER, False),
        ("no number", "no number", NUMBER, False),
        ("6 x 7 = 42", "42", NUMBER, False),
        ("6 x 7 = 42", "42", {**NUMBER, "extract_last": True}, True),
        ("it is 42", "42", {"extract": r"(\d{3})|(\d+)"}, True),
        ("Yes", "yes", {"ignore_case": True}, True),
        ("yes!", "yes", {"ignore_punctuation": True}, True),
        ("$1,042", "1042", {"ignore": [",", r"\$"]}, True),
        (
            "so A, B",
            "a b",
            {"ignore": "so ", "ignore_case": True, "ignore_punctuation": True},
            True,
        ),
    ],
)
def test_a_match_is_exact_apart_from_what_does_not_count(
    text: str, answer: str, keys: dict[str, Any], expected: bool
) -> None:
    assert is_match(text, answer, GenerateSpec(**keys)) is expected


def test_keys_that_are_not_used_are_not_stored() -> None:
    stored = GenerateSpec(max_new_tokens=3, ignore_case=False).model_dump(mode="json")
    assert stored == {"max_new_tokens": 3, "stop": ["\n"], "extract": None}
    used = GenerateSpec(extract="a", extract_last=True, ignore=("b",))
    assert GenerateSpec.from_json(used.to_json()) == used


@pytest.mark.parametrize("keys", [{"extract": "("}, {"ignore": ["a", "("]}, {"extract_last": True}])
def test_keys_that_cannot_be_used_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"not a regular expression|needs 'extract'"):
        GenerateSpec(**keys)
