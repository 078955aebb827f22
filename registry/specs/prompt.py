"""Prompts: a text with the names of columns in braces, which each row fills in.

Families of masked language models read `{mask}` as the place of the answer, and not as a column.
"""

import re
from collections.abc import Mapping

_PART = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
MASK = "mask"
_BRACES = {"{{": "{", "}}": "}"}


def prompt_columns(prompt: str) -> tuple[str, ...]:
    """The columns that a prompt names, each once, in order.

    Raises:
        ValueError: it names none, or has a brace that stands for nothing.
    """
    columns = []
    for part in _PART.finditer(prompt):
        if part[0] in ("{", "}", "{}"):
            raise ValueError(
                f"the prompt has {part[0]!r} at character {part.start()}: write the name of a"
                " column between braces, and '{{' or '}}' for a brace of the text"
            )
        if part[1] is not None:
            columns.append(part[1])
    if not columns:
        raise ValueError(
            f"the prompt {prompt[:60]!r} names no column: write its name in braces, such as"
            " 'Question: {text}'"
        )
    return tuple(dict.fromkeys(columns))


def fill_in(prompt: str, values: Mapping[str, str]) -> str:
    """The prompt of a row, with its values in place of the columns' names."""
    return _PART.sub(lambda part: _BRACES.get(part[0]) or values[part[1]], prompt)


def parts_at_mask(prompt: str) -> list[str]:
    """The parts of a prompt between its masks: two parts if it has one `{mask}`."""
    parts, end = [], 0
    for part in _PART.finditer(prompt):
        if part[1] == MASK:
            parts.append(prompt[end : part.start()])
            end = part.end()
    return [*parts, prompt[end:]]
