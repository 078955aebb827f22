"""Choices that differ from row to row: a list of answers in each row, and which ones are right."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from restitch.merging.errors import BadInput
from restitch.modeling.data.tables import Table
from restitch.modeling.data.texts import text_of
from restitch.registry.specs.head import check_choices

_SHOWN = 80
_MOST_DIGITS = 9
_HINT = "correct the column under label:; unlabelled: under data leaves out rows without a label"

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


def right_choices(table: Table, column: str, choices: Sequence[Choices]) -> list[tuple[int, ...]]:
    """The indices of the right choices of every row: its label, or a list of labels.

    A whole number is an index. A text is one of the row's choices; only if no text of the column
    is, texts of digits are indices.

    Raises:
        BadInput: a label is neither, or can be read in two ways, or a list is empty; names the row.
    """
    labels = [
        (row, label)
        for row, value in enumerate(table.column(column))
        for label in (value if isinstance(value, (list, tuple)) else [value])
    ]
    right: list[tuple[int, ...]] = [()] * len(choices)
    for (row, _), index in zip(labels, _indices(table, labels, choices), strict=True):
        right[row] = (*right[row], index)
    if () in right:
        raise BadInput(
            f"{table.where(right.index(()))} has no right choice",
            expected="an index, one of the choices, or a list of them",
            found="an empty list",
            hint=_HINT,
        )
    return right


def _indices(
    table: Table, labels: Sequence[tuple[int, Any]], choices: Sequence[Choices]
) -> list[int]:
    """The index that each label is; the labels come with their rows."""
    numbers = [_number(label, len(choices[row])) for row, label in labels]
    texts = [
        choices[row].index(label) if isinstance(label, str) and label in choices[row] else None
        for row, label in labels
    ]
    strings = [at for at, (_, label) in enumerate(labels) if isinstance(label, str)]
    unclear = [at for at in strings if texts[at] not in (None, numbers[at])]
    unclear = [at for at in unclear if numbers[at] is not None]
    as_texts = all(texts[at] is not None for at in strings)
    as_numbers = all(numbers[at] is not None for at in strings)
    if unclear and as_texts == as_numbers:
        at = unclear[0]
        row, label = labels[at]
        raise BadInput(
            f"{table.where(row)}: the label can be read in two ways",
            expected="labels that are either texts or indices of the choices",
            found=f"{label!r} is choice {texts[at]}, and the index of"
            f" {choices[row][numbers[at] or 0]!r}",
            hint="write the labels as whole numbers in JSON lines or Parquet",
        )
    read = numbers if as_numbers and not as_texts else texts
    result = []
    for at, (row, label) in enumerate(labels):
        index = read[at] if isinstance(label, str) else numbers[at]
        if index is None:
            raise BadInput(
                f"{table.where(row)}: the label is not one of the row's choices",
                expected=f"an index from 0 to {len(choices[row]) - 1}, or one of"
                f" {', '.join(map(repr, choices[row]))}"[: 4 * _SHOWN],
                found=repr(label)[:_SHOWN],
                hint=_HINT,
            )
        result.append(index)
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
