"""Rows of a table as a model reads them: decoded inputs, and classes as indices.

With a prompt, the input of a row is the prompt with the row's values in it. Rows keep the order of
their table. Labels are checked against the classes before any input is read; nothing is guessed,
and every error names its file and row.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restitch.merging.digests import digest_bytes, digest_json
from restitch.merging.errors import BadInput
from restitch.modeling.data.choices import right_choices, row_choices
from restitch.modeling.data.images import image_bytes, open_image
from restitch.modeling.data.labels import Classes, class_indices
from restitch.modeling.data.numbers import numbers
from restitch.modeling.data.tables import ListTable, Table
from restitch.modeling.data.texts import answers_of, text_of
from restitch.registry.specs.data import Modality
from restitch.registry.specs.head import TextUnit
from restitch.registry.specs.prompt import fill_in, parts_at_mask

_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Prompt:
    """How rows become questions.

    Attributes:
        text: with the names of columns in braces.
        choices_column: the column with the choices of each row; None if all rows have the same.
        answer: the column with the right answer of each row, or a list of them. The first one has
            class 0.
        chat: it is a turn of the user in a chat.
        mask: `{mask}` is the place of the answer: a row's texts are what stands before and after.
    """

    text: str
    choices_column: str | None = None
    answer: str | None = None
    chat: bool = False
    mask: bool = False

    @property
    def own(self) -> str | None:
        """The column with a row's own choices or answer."""
        return self.choices_column or self.answer


@dataclass(frozen=True)
class Example:
    """One row, ready for a preprocessor.

    Attributes:
        inputs: texts, or one `PIL.Image.Image`.
        label: the index of its class, the first one of several right choices; None if the data has
            no labels.
        where: file and row, for errors.
        choices: the names of the classes, or the first right answer alone; None fills up the lists
            of rows that have fewer choices than others.
        chat: the text is a turn of the user in a chat.
        number: its number, for a head that gives one.
    """

    inputs: tuple[Any, ...]
    label: int | None
    where: str
    choices: tuple[str | None, ...] = ()
    chat: bool = False
    number: float | None = None


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
        prompt: how the values of a row become one text; None leaves them as they are.
        of_numbers: the label column has numbers, not classes.
        left_out: how many other rows have no label and are left out.
    """

    table: Table
    inputs: tuple[str, ...]
    label: str | None
    labels: tuple[str, ...]
    modality: Modality
    indices: NDArray[np.int64] | None = None
    classes: tuple[str, ...] | None = None
    prompt: Prompt | None = None
    of_numbers: bool = False
    left_out: int = 0
    _memo: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.table) if self.indices is None else len(self.indices)

    def __getitem__(self, position: int) -> Example:
        row = position if self.indices is None else int(self.indices[position])
        where = self.table.where(row)
        target = None if self.label is None else self.targets[position].item()
        label, number = (None, target) if self.of_numbers else (target, None)
        if self.modality == "text":
            chat = self.prompt is not None and self.prompt.chat
            return Example(self._texts(row), label, where, self._choices(row), chat, number)
        inputs = tuple(
            open_image(value, self.table.root, f"{where}, column {column!r}")
            for column, value in zip(self.inputs, self.table.row(row, self.inputs), strict=True)
        )
        return Example(inputs, label, where, self.labels)

    def _texts(self, row: int) -> tuple[str, ...]:
        """The texts of a row of the table: its prompt, or its values."""
        where = self.table.where(row)
        values = self.table.row(row, self.inputs)
        if self.prompt is not None:
            # Numbers read the same in a prompt, whichever kind of file they come from.
            values = tuple(str(value) if type(value) is int else value for value in values)
        texts = tuple(
            text_of(value, f"{where}, column {column!r}")
            for column, value in zip(self.inputs, values, strict=True)
        )
        if self.prompt is None:
            return texts
        named = dict(zip(self.inputs, texts, strict=True))
        parts = parts_at_mask(self.prompt.text) if self.prompt.mask else [self.prompt.text]
        return tuple(fill_in(part, named) for part in parts)

    def _choices(self, row: int) -> tuple[str | None, ...]:
        """The choices of a row of the table, filled up to the number of classes."""
        if self.prompt is not None and self.prompt.answer is not None:
            return self._answers(row, self.prompt.answer)[:1]
        if self._lists is None:
            return self.labels
        own = self._lists[row]
        return (*own, *[None] * (self.class_count - len(own)))

    def _answers(self, row: int, column: str) -> tuple[str, ...]:
        """The right answers of a row of the table."""
        value = self.table.row(row, (column,))[0]
        return answers_of(value, f"{self.table.where(row)}, column {column!r}")

    @property
    def answers(self) -> list[tuple[str, ...]]:
        """The right answers of every row, for a prompt with `answer`."""
        assert self.prompt is not None
        assert self.prompt.answer is not None
        return [self._answers(row, self.prompt.answer) for row in self._places]

    @property
    def _places(self) -> Sequence[int]:
        """The rows of the table."""
        return range(len(self.table)) if self.indices is None else self.indices.tolist()

    @property
    def _lists(self) -> list[tuple[str, ...]] | None:
        """The choices of each row of the table; None if all rows have the same."""
        if self.prompt is None or self.prompt.choices_column is None:
            return None
        if "lists" not in self._memo:
            self._memo["lists"] = row_choices(self.table, self.prompt.choices_column)
        lists: list[tuple[str, ...]] = self._memo["lists"]
        return lists

    @property
    def _right(self) -> list[tuple[int, ...]] | None:
        """The right choices of each row of the table; None if all rows have the same choices."""
        lists = self._lists
        if lists is None or self.label is None:
            return None
        if "right" not in self._memo:
            self._memo["right"] = right_choices(self.table, self.label, lists)
        right: list[tuple[int, ...]] = self._memo["right"]
        return right

    @property
    def right(self) -> list[tuple[int, ...]] | None:
        """The indices of the right choices of every row; None if all rows have the same choices."""
        right = self._right
        return None if right is None else [right[row] for row in self._places]

    @property
    def class_count(self) -> int:
        """The number of classes: the most that a row of the table has to choose from."""
        if "count" not in self._memo:
            lists = self._lists
            self._memo["count"] = len(self.labels) if lists is None else max(map(len, lists))
            if self.prompt is not None and self.prompt.answer is not None:
                self._memo["count"] = 1
        count: int = self._memo["count"]
        return count

    def select(self, positions: Sequence[int] | NDArray[np.int64]) -> "Rows":
        """The rows at these positions, in the given order."""
        chosen = np.asarray(positions, dtype=np.int64)
        base = np.arange(len(self.table)) if self.indices is None else self.indices
        same: dict[str, Any] = {
            key: self._memo[key] for key in ("lists", "count", "right") if key in self._memo
        }
        return replace(self, indices=base[chosen], _memo=same)

    @property
    def targets(self) -> NDArray[Any]:
        """The class index of every row, or its number, without reading inputs.

        A row with several right choices has the first one.
        """
        if "targets" not in self._memo:
            if self.label is None:
                raise BadInput(
                    f"the rows of {self.table.name} have no labels",
                    hint="set label: to the column with the class",
                )
            right = self._right
            notes: tuple[str, ...] = ()
            indices: NDArray[Any]
            if self.of_numbers:
                indices = numbers(self.table, self.label)
            elif self.prompt is not None and self.prompt.answer is not None:
                indices = np.zeros(len(self.table), dtype=np.int64)
            elif right is not None:
                indices = np.array([own[0] for own in right], dtype=np.int64)
            else:
                indices, notes = class_indices(
                    self.table, self.label, Classes(self.labels, self.classes)
                )
            self._memo["targets"] = indices if self.indices is None else indices[self.indices]
            self._memo["notes"] = notes
        result: NDArray[Any] = self._memo["targets"]
        return result

    @property
    def strata(self) -> NDArray[np.int64]:
        """The class index of every row, of which samples take a share each; 0 without classes."""
        alike = self.label is None or self.of_numbers
        return np.zeros(len(self), dtype=np.int64) if alike else self.targets

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about files and lines that are left out, and about how labels are read."""
        if self.label is not None:
            _ = self.targets
        return (*self.table.notes, *self._memo.get("notes", ()))

    def lengths(self) -> NDArray[np.int64]:
        """The number of characters in all texts of each row."""
        return np.array(
            [sum(len(str(v)) for v in self.table.row(row, self.inputs)) for row in self._places],
            dtype=np.int64,
        )

    def text_lengths(self, unit: TextUnit) -> NDArray[np.int64]:
        """The number of words or bytes of each row's one text, as lm-eval counts them."""
        texts = (self[place].inputs[0] for place in range(len(self)))
        counts = (
            len(_SPACE.split(text)) if unit == "word" else len(text.encode()) for text in texts
        )
        return np.fromiter(counts, dtype=np.int64, count=len(self))

    def in_memory(self) -> "Rows":
        """The same rows in memory, read in the table's order: for few rows that are read often."""
        rows = self._places
        own = None if self.prompt is None else self.prompt.choices_column
        columns = (*self.inputs, *(name for name in (self.label, own) if name is not None))
        read = {row: self.table.row(row, columns) for row in sorted(set(rows))}
        values = {
            column: [read[row][place] for row in rows] for place, column in enumerate(columns)
        }
        wheres = [self.table.where(row) for row in rows]
        table = ListTable(self.table.name, self.table.root, values, wheres=wheres)
        memo: dict[str, Any] = {} if self.label is None else {"targets": self.targets}
        if (right := self.right) is not None:
            memo["right"] = right
        return replace(self, table=table, indices=None, _memo=memo)

    def digest(self) -> str:
        """The digest of raw inputs and classes, independent of where the rows are."""
        inputs = []
        for row in self._places:
            if self.modality == "image":
                where = self.table.where(row)
                values = tuple(
                    digest_bytes(image_bytes(value, self.table.root, where))
                    for value in self.table.row(row, self.inputs)
                )
            else:
                values = self._texts(row)
            own = () if self.prompt is None or self.prompt.own is None else self._choices(row)
            inputs.append([*values, *(choice for choice in own if choice is not None)])
        targets = None if self.label is None else self.targets.tolist()
        return digest_json({"inputs": inputs, "targets": targets})
