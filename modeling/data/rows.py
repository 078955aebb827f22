"""Rows of a table as a model reads them: decoded inputs, and classes as indices.

Rows keep the order of their table. Labels are checked against the classes before any input is
read; nothing is guessed, and every error names its file and row.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restitch.merging.digests import digest_bytes, digest_json
from restitch.merging.errors import BadInput
from restitch.modeling.data.images import image_bytes, open_image
from restitch.modeling.data.labels import Classes, class_indices
from restitch.modeling.data.tables import ListTable, Table
from restitch.registry.specs.task import Modality

_HALVES = re.compile("[\ud800-\udfff]")
_SHOWN = 80


@dataclass(frozen=True)
class Example:
    """One row, ready for a preprocessor.

    Attributes:
        inputs: texts, or one `PIL.Image.Image`.
        label: the index of its class; None if the data has no labels.
        where: file and row, for errors.
    """

    inputs: tuple[Any, ...]
    label: int | None
    where: str


@dataclass(frozen=True)
class Rows:
    """Some rows of one table, in order.

    Attributes:
        table: the table that holds them.
        inputs: the input columns.
        label: the label column, or None.
        labels: the names of the classes.
        modality: how inputs are read.
        indices: the rows of the table; None for all.
        classes: the names of the classes in the label column; None if they are the labels.
    """

    table: Table
    inputs: tuple[str, ...]
    label: str | None
    labels: tuple[str, ...]
    modality: Modality
    indices: NDArray[np.int64] | None = None
    classes: tuple[str, ...] | None = None
    _memo: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.table) if self.indices is None else len(self.indices)

    def __getitem__(self, position: int) -> Example:
        row = position if self.indices is None else int(self.indices[position])
        where = self.table.where(row)
        values = self.table.row(row, self.inputs)
        read = _text if self.modality == "text" else self._image
        inputs = tuple(
            read(value, f"{where}, column {column!r}")
            for column, value in zip(self.inputs, values, strict=True)
        )
        return Example(inputs, None if self.label is None else int(self.targets[position]), where)

    def select(self, positions: Sequence[int] | NDArray[np.int64]) -> "Rows":
        """The rows at these positions, in the given order."""
        chosen = np.asarray(positions, dtype=np.int64)
        base = np.arange(len(self.table)) if self.indices is None else self.indices
        return replace(self, indices=base[chosen], _memo={})

    @property
    def targets(self) -> NDArray[np.int64]:
        """The class index of every row, without reading inputs."""
        if "targets" not in self._memo:
            if self.label is None:
                raise BadInput(
                    f"the rows of {self.table.name} have no labels",
                    hint="set label: to the column with the class",
                )
            indices, notes = class_indices(
                self.table, self.label, Classes(self.labels, self.classes)
            )
            self._memo["targets"] = indices if self.indices is None else indices[self.indices]
            self._memo["notes"] = notes
        result: NDArray[np.int64] = self._memo["targets"]
        return result

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about files and lines that are left out, and about how labels are read."""
        if self.label is not None:
            _ = self.targets
        return (*self.table.notes, *self._memo.get("notes", ()))

    def lengths(self) -> NDArray[np.int64]:
        """The number of characters in all texts of each row."""
        rows = range(len(self.table)) if self.indices is None else self.indices.tolist()
        return np.array(
            [sum(len(str(v)) for v in self.table.row(row, self.inputs)) for row in rows],
            dtype=np.int64,
        )

    def in_memory(self) -> "Rows":
        """The same rows in memory, read in the table's order: for few rows that are read often."""
        rows = np.arange(len(self.table)) if self.indices is None else self.indices
        columns = (*self.inputs, *(() if self.label is None else (self.label,)))
        read = {row: self.table.row(row, columns) for row in sorted(set(rows.tolist()))}
        values = {
            column: [read[row][place] for row in rows.tolist()]
            for place, column in enumerate(columns)
        }
        wheres = [self.table.where(row) for row in rows.tolist()]
        table = ListTable(self.table.name, self.table.root, values, wheres=wheres)
        memo = {} if self.label is None else {"targets": self.targets}
        return replace(self, table=table, indices=None, _memo=memo)

    def digest(self) -> str:
        """The digest of raw inputs and classes, independent of where the rows are."""
        rows = range(len(self.table)) if self.indices is None else self.indices.tolist()
        inputs = []
        for row in rows:
            values = self.table.row(row, self.inputs)
            if self.modality == "image":
                where = self.table.where(row)
                values = tuple(
                    digest_bytes(image_bytes(value, self.table.root, where)) for value in values
                )
            else:
                where = self.table.where(row)
                values = tuple(_text(value, where) for value in values)
            inputs.append(list(values))
        targets = None if self.label is None else self.targets.tolist()
        return digest_json({"inputs": inputs, "targets": targets})

    def _image(self, value: object, where: str) -> Any:
        return open_image(value, self.table.root, where)


def _text(value: object, where: str) -> str:
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
