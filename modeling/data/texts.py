"""Texts of rows, checked before a tokenizer sees them."""

import math
import re

from restitch.merging.errors import BadInput

_HALVES = re.compile("[\ud800-\udfff]")
_SHOWN = 80


def text_of(value: object, where: str) -> str:
    """A value that must be a text.

    Raises:
        BadInput: it is something else, or not valid Unicode.
    """
    if not isinstance(value, str):
        raise BadInput(
            f"{where} is not a text",
            expected="a string",
            found=f"{type(value).__name__} {value!r}"[:_SHOWN],
            hint=None
            if value is not None
            else "leave out rows without a text, or write an empty one",
        )
    half = _HALVES.search(value)
    if half is not None:
        raise BadInput(
            f"{where} has half of a character",
            expected="Unicode text without lone surrogates",
            found=f"\\u{ord(half[0]):04x} at character {half.start()}",
            hint="write the text again as UTF-8, or remove the row",
        )
    return value


def answers_of(value: object, where: str) -> tuple[str, ...]:
    """The right answers in a column: a text or a number, or a list of them.

    A number is read as text, with six digits.

    Raises:
        BadInput: an answer is something else or empty, or there is none.
    """
    values = value if isinstance(value, (list, tuple)) else [value]
    if not values:
        raise BadInput(
            f"{where} has no answer",
            expected="a text, or a list of texts",
            found="an empty list",
            hint="write the answers that are right, or leave out the row",
        )
    return tuple(_answer(one, where) for one in values)


def _answer(value: object, where: str) -> str:
    if type(value) is int or (type(value) is float and math.isfinite(value)):
        value = f"{value:.6g}" if isinstance(value, float) else str(value)
    answer = text_of(value, where)
    if not answer.strip():
        raise BadInput(
            f"{where} is an empty answer",
            expected="a text that the model can generate",
            found=repr(answer),
            hint="write the answer, or leave out the row",
        )
    return answer
