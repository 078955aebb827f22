"""Rows of a table as a model reads them: decoded inputs, and classes as indices.

Rows keep the order of their table. Labels are checked against the classes before any input is
read; nothing is guessed, and every error names its file and row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restitch.merging.digests import digest_bytes, digest_json
from restitch.merging.errors import BadInput
from restitch.modeling.data.imagenet import are_synsets, synset_classes
from restitch.modeling.data.images import image_bytes, open_image
from restitch.modeling.data.tables import ListTable, Table
from restitch.registry.specs.task import Modality


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
    """

    table: Table
    inputs: tuple[str, ...]
    label: str | None
    labels: tuple[str, ...]
    modality: Modality
    indices: NDArray[np.int64] | None = None
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
            indices = _class_indices(self.table, self.label, self.labels)
            self._memo["targets"] = indices if self.indices is None else indices[self.indices]
        result: NDArray[np.int64] = self._memo["targets"]
        return result

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
            inputs.append(list(values))
        targets = None if self.label is None else self.targets.tolist()
        return digest_json({"inputs": inputs, "targets": targets})

    def _image(self, value: object, where: str) -> Any:
        return open_image(value, self.table.root, where)


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise BadInput(
            f"{where} is not a text", expected="a string", found=f"{type(value).__name__} {value!r}"
        )
    return value


def _class_indices(table: Table, column: str, labels: tuple[str, ...]) -> NDArray[np.int64]:
    """The class index of every row: an index stays, a name is looked up in the labels.

    If the data set names its classes and all names are labels, the names decide and not the
    data set's own order. Folders named by synset ids are classes in sorted order.
    """
    names: Mapping[str, int] = {name: index for index, name in enumerate(labels)}
    own = table.class_names(column) or ()
    translated: dict[Any, Any] = {}
    if own and set(own) <= set(labels):
        translated = dict(enumerate(own))
    elif are_synsets(own):
        translated |= synset_classes(own, labels, table.synsets, table.name)
    result = np.empty(len(table), dtype=np.int64)
    for row, raw in enumerate(table.column(column)):
        value = translated.get(raw, raw) if translated else raw
        index = _class_index(value, names, len(labels))
        if index is None:
            raise BadInput(
                f"{table.where(row)}: the label is not one of the classes",
                expected=f"an index from 0 to {len(labels) - 1}, or one of {_some(labels)}",
                found=repr(value),
                hint="check the column under label: and the classes under head: labels",
            )
        if isinstance(value, str) and labels.count(value) > 1:
            raise BadInput(
                f"{table.where(row)}: the label {value!r} is the name of several classes",
                hint="use class indices in the label column",
            )
        result[row] = index
    return result


def _class_index(value: object, names: Mapping[str, int], classes: int) -> int | None:
    if isinstance(value, str):
        if value in names:
            return names[value]
        text = value.strip()
        if not (text.isascii() and text.isdigit()):
            return None
        value = int(text)
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value) if 0 <= value < classes else None
    return None


def _some(labels: Sequence[str]) -> str:
    shown = ", ".join(labels[:8])
    return shown if len(labels) <= 8 else f"{shown}, ..."
