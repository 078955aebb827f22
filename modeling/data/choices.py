"""Choices that differ from row to row: a list of answers in each row, and which one is right."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from restitch.merging.errors import BadInput
from restitch.modeling.data.tables import Table
from restitch.modeling.data.texts import text_of
from restitch.registry.specs.task import check_choices

_SHOWN = 80
_MOST_DIGITS = 9

Choices = tuple[str, ...]


def row_choices(table: Table, column: str) -> list[Choices]:
    """The choices of every row.

    Raises:
        BadInput: a value is no list of different texts; names the row.
    """
    return [
        _choices(value, f"{table.where(row)}, column {column!r}")
        for row, value in enumerate(table.column(column))
    ]


def _choices(value: object, where: str) -> Choices:
    if not isinstance(value, (list, tuple)):
        raise BadInput(
            f"{where} is no list of choices",
            expected="a list of texts",
            found=f"{type(value).__name__} {value!r}"[:_SHOWN],
            hint="write the choices of each row as a list, in JSON lines or Parquet",
        )
    choices = tuple(text_of(one, f"{where}, choice {n}") for n, one in enumerate(value))
    try:
        check_choices(choices)
    except ValueError as error:
        raise BadInput(
            f"{where}: {error}",
            found=repr(list(choices))[:_SHOWN],
            hint="correct the row, or leave it out",
        ) from error
    return choices


def choice_indices(table: Table, column: str, choices: Sequence[Choices]) -> NDArray[np.int64]:
    """The index of the right choice of every row.

    A whole number is an index. A text is one of the row's choices; only if no text of the column
    is, texts of digits are indices.

    Raises:
        BadInput: a label is neither, or can be read in two ways; names the row.
    """
    values = table.column(column)
    numbers = [_number(value, len(own)) for value, own in zip(values, choices, strict=True)]
    texts = [
        own.index(value) if isinstance(value, str) and value in own else None
        for value, own in zip(values, choices, strict=True)
    ]
    strings = [row for row, value in enumerate(values) if isinstance(value, str)]
    unclear = [row for row in strings if texts[row] not in (None, numbers[row])]
    unclear = [row for row in unclear if numbers[row] is not None]
    as_texts = all(texts[row] is not None for row in strings)
    as_numbers = all(numbers[row] is not None for row in strings)
    if unclear and as_texts == as_numbers:
        row = unclear[0]
        raise BadInput(
            f"{table.where(row)}: the label can be read in two ways",
            expected="labels that are either texts or indices of the choices",
            found=f"{values[row]!r} is choice {texts[row]}, and the index of"
            f" {choices[row][numbers[row] or 0]!r}",
            hint="write the labels as whole numbers in JSON lines or Parquet",
        )
    read = numbers if as_numbers and not as_texts else texts
    result = np.empty(len(table), dtype=np.int64)
    for row, value in enumerate(values):
        index = read[row] if isinstance(value, str) else numbers[row]
        if index is None:
            raise BadInput(
                f"{table.where(row)}: the label is not one of the row's choices",
                expected=f"an index from 0 to {len(choices[row]) - 1}, or one of"
                f" {', '.join(map(repr, choices[row]))}"[: 4 * _SHOWN],
                found=repr(value)[:_SHOWN],
                hint="correct the column under label:, or leave out rows without a label",
            )
        result[row] = index
    return result


def _number(value: object, choices: int) -> int | None:
    """The index that a label is, if it is one."""
    if isinstance(value, str):
        text = value.strip()
        value = (
            int(text) if text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS else None
        )
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value) if 0 <= value < choices else None
    return None
