"""The number of every row, for tasks whose head gives one."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restitch.merging.errors import BadInput
from restitch.modeling.data.tables import Table

_SHOWN = 60


def numbers(table: Table, column: str) -> NDArray[np.float64]:
    """The numbers of a column; texts are read as numbers, because CSV has nothing else.

    Raises:
        BadInput: a value is no finite number, or the data set says that they are classes; names
            the row.
    """
    names = table.class_names(column)
    if names is not None:
        raise BadInput(
            f"{table.name}, column {column!r} has classes",
            expected="numbers, by metric: squared_error",
            found=f"the classes {', '.join(map(repr, names[:3]))}, ...",
            hint="name the column with the numbers under data: label, or choose another metric",
        )
    values = [_number(value) for value in table.column(column)]
    wrong = next((row for row, value in enumerate(values) if value is None), None)
    if wrong is not None:
        raise BadInput(
            f"{table.where(wrong)}, column {column!r} is not a number",
            expected="a finite number, such as 3.8",
            found=repr(table.column(column)[wrong])[:_SHOWN],
            hint="correct the row; data: label names the column, and data: unlabelled the value"
            " of rows to leave out",
        )
    return np.array(values, dtype=np.float64)


def _number(value: Any) -> float | None:
    """The value as a finite number; None if it is none."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | str | np.number):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None
