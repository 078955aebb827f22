"""Texts of rows, checked before a tokenizer sees them."""

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
