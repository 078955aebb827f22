"""The class index of every row that has a label: an index, or the name of a class.

A name counts in any case and Unicode form, with `_` or a space between words. If the data set
names its classes itself, its names decide and not its order. Labels with two readings that differ
are refused with both lists of names, and `classes:` under `data` decides.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restitch.merging.errors import BadInput
from restitch.modeling.data.file_kinds import printable
from restitch.modeling.data.imagenet import are_synsets, synset_classes
from restitch.modeling.data.tables import Table

_SHOWN = 8
_LONGEST = 60  # characters of one label in an error
_Found = dict[tuple[str, object], int | None]  # the class of each value in a column
_WHOLE = re.compile(r"(?<=\d)\.0+\Z")  # what a whole number with a fraction ends with
_DECIDE = "set classes: under data to the names in the data, in the order of the task's classes"


@dataclass(frozen=True)
class Classes:
    """The classes of a task, as its data calls them.

    Attributes:
        labels: the labels of the head.
        names: the names that the data uses, in the order of the labels; None: the labels.
    """

    labels: tuple[str, ...]
    names: tuple[str, ...] | None = None

    @property
    def in_data(self) -> tuple[str, ...]:
        """The names by which the data calls the classes."""
        return self.labels if self.names is None else self.names


@dataclass
class _Lookup:
    """Finds the class of a name or a number.

    Attributes:
        renamed: the names that differ from those of the classes in case or underscores only.
    """

    classes: Classes
    renamed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.classes.names is not None and len(self.classes.names) != len(self.classes.labels):
            raise BadInput(
                "data: classes does not fit the labels",
                expected=f"{len(self.classes.labels)} names, as under head: labels or choices",
                found=f"{len(self.classes.names)} names",
            )
        self._exact: dict[str, list[int]] = {}
        self._folded: dict[str, list[int]] = {}
        for index, name in enumerate(self.classes.in_data):
            self._exact.setdefault(name, []).append(index)
            self._folded.setdefault(_folded(name), []).append(index)

    def by_name(self, name: str, where: str) -> int | None:
        """The class with this name, exact or else in another case or with underscores.

        Raises:
            BadInput: several classes have it.
        """
        found = self._exact.get(name) or self._folded.get(_folded(name), [])
        if len(found) > 1:
            raise BadInput(
                f"{where}: the label {name!r} is the name of several classes",
                found=", ".join(repr(self.classes.in_data[index]) for index in found[:_SHOWN]),
                hint="use class indices in the label column",
            )
        if found and self.classes.in_data[found[0]] != name:
            self.renamed[name] = self.classes.in_data[found[0]]
        return found[0] if found else None

    def by_number(self, value: object) -> int | None:
        """The class with this index; None if `classes:` names the classes."""
        if self.classes.names is not None:
            return None
        if isinstance(value, str):
            text = value.strip()
            value = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None
        if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
            return int(value) if 0 <= value < len(self.classes.labels) else None
        return None

    def by_own_name(self, name: str, where: str) -> int | None:
        """The class for a name that the data set gives to one of its classes."""
        index = self.by_name(name, where)
        return self.by_number(name) if index is None else index


def class_indices(
    table: Table, column: str, classes: Classes
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """The class index of every row, and notes about how labels were read.

    Raises:
        BadInput: a label is not one of the classes, or has two readings; names the row.
    """
    lookup, values = _Lookup(classes), table.column(column)
    own = table.class_names(column) or ()
    notes: list[str] = []
    known: _Found
    if are_synsets(own) and classes.names is None:
        synsets = synset_classes(own, classes.labels, table.synsets, table.name)
        known = {_key(name): index for name, index in synsets.items()}
        known |= {_key(place): synsets[name] for place, name in enumerate(own)}
    elif own and not any(isinstance(value, str) for value in values):
        known = _by_own_names(table, column, own, lookup, notes)
    else:
        known = _by_values(table, values, lookup)
    result = np.empty(len(table), dtype=np.int64)
    for row, value in enumerate(values):
        index = known.get(_key(value))
        if index is None:
            raise _unknown(table, row, value, values, own, classes)
        result[row] = index
    if lookup.renamed:
        pairs = [f"{name!r} is read as {label!r}" for name, label in lookup.renamed.items()]
        notes.append(f"{table.name}: labels in another form: {_some(pairs)}")
    return result, tuple(notes)


def labelled_rows(table: Table, column: str, unlabelled: str, classes: Classes) -> list[int]:
    """The rows that have a label.

    Args:
        table: the table.
        column: its label column.
        unlabelled: the value of rows without a label, compared as a text: `-1` is also -1.0, and
            an empty text also a missing value.
        classes: the classes of the task.

    Raises:
        BadInput: the value is a class of the task, or no row has a label.
    """
    lookup = _Lookup(classes)
    if lookup.by_own_name(unlabelled, table.name) is not None:
        raise BadInput(
            f"{table.name}: the rows without a label cannot be told from those of a class",
            expected="a value of unlabelled: that is neither the name nor the index of a class",
            found=f"unlabelled: {unlabelled!r}",
            hint="correct unlabelled: under data, or name the classes of the data in classes:",
        )
    own = table.class_names(column) or ()
    none = _comparable(unlabelled, ())
    rows = [
        row for row, value in enumerate(table.column(column)) if _comparable(value, own) != none
    ]
    if not rows:
        raise BadInput(
            f"{table.name} has no row with a label",
            expected="rows with labels",
            found=f"{len(table)} rows with {unlabelled!r}, the value of unlabelled: under data",
            hint="name another split: those of a public test often have no labels",
        )
    return rows


def _comparable(value: object, own: Sequence[str]) -> str:
    """A label as a text to compare; an index into the data set's own names is the name."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(own):
        return own[value]
    text = "" if value is None else _text(value).strip()
    return _WHOLE.sub("", text)


def _by_own_names(
    table: Table, column: str, own: Sequence[str], lookup: _Lookup, notes: list[str]
) -> _Found:
    """The class of each index into the names that the data set itself has."""
    labels = lookup.classes.in_data
    found = [lookup.by_own_name(name, table.name) for name in own]
    used = [index for index in found if index is not None]
    if len(set(used)) < len(used):
        raise _ambiguous(table, column, own, labels, "several of its names are of one class")
    if used:
        return {_key(place): index for place, index in enumerate(found)}
    if lookup.classes.names is not None or len(own) != len(labels):
        raise _ambiguous(table, column, own, labels, "none of its names is a class of the task")
    for index, name in enumerate(own):
        near = [place for place, label in enumerate(labels) if _resembles(name, label)]
        if len(near) == 1 and near[0] != index:
            problem = f"{name!r} is class {index}, but resembles {labels[near[0]]!r}"
            raise _ambiguous(table, column, own, labels, problem)
    pairs = [f"{name!r} is {label!r}" for name, label in zip(own, labels, strict=True)]
    notes.append(f"{table.name}: classes are matched by their order: {_some(pairs)}")
    return {_key(index): index for index in range(len(own))}


def _by_values(table: Table, values: Sequence[Any], lookup: _Lookup) -> _Found:
    """The class of each value, which is an index or a name."""
    distinct = {_key(value): value for value in values}
    named = {key: lookup.by_name(_text(value), table.name) for key, value in distinct.items()}
    numbered = {key: lookup.by_number(value) for key, value in distinct.items()}
    unclear = [key for key in distinct if _differ(named[key], numbered[key])]
    names_win = True
    if unclear:
        # A value with one reading shows which of the two is meant.
        only_name = any(numbered[key] is None and named[key] is not None for key in distinct)
        only_number = any(named[key] is None and numbered[key] is not None for key in distinct)
        if only_name == only_number:
            texts = table.typed and all(isinstance(distinct[key], str) for key in unclear)
            if only_name or not texts:
                raise _two_readings(table, distinct.values(), distinct[unclear[0]], lookup)
        names_win = not only_number
    first, second = (named, numbered) if names_win else (numbered, named)
    return {key: second[key] if first[key] is None else first[key] for key in distinct}


def _differ(one: int | None, other: int | None) -> bool:
    return one is not None and other is not None and one != other


def _two_readings(
    table: Table, values: Iterable[object], value: object, lookup: _Lookup
) -> BadInput:
    labels = lookup.classes.in_data
    number = lookup.by_number(value)
    assert number is not None
    return BadInput(
        f"{table.name}: the labels can be read in two ways",
        expected="labels that are either names or indices of the classes",
        found=f"{value!r} is the name of a class, and the index of the class {labels[number]!r}",
        details=_lists(map(_text, values), labels),
        hint=_DECIDE,
    )


def _ambiguous(
    table: Table, column: str, own: Sequence[str], labels: Sequence[str], problem: str
) -> BadInput:
    return BadInput(
        f"{table.name}: the classes of column {column!r} do not match those of the task",
        expected="the same names, in any order and case, with _ or spaces",
        found=problem,
        details=_lists(own, labels),
        hint=_DECIDE,
    )


def _unknown(
    table: Table,
    row: int,
    value: object,
    values: Sequence[Any],
    own: Sequence[str],
    classes: Classes,
) -> BadInput:
    """The error for a label that is not one of the classes."""
    labels = classes.in_data
    number = f"an index from 0 to {len(labels) - 1}, or " if classes.names is None else ""
    hint = "check the column under label: and the classes under head: labels or choices"
    if re.fullmatch(r"-\d+", _text(value)):
        hint = f"if rows with {value} have no label, leave them out: unlabelled: {value} under data"
    elif value in (None, ""):
        hint = 'leave out the rows without a label: unlabelled: "" under data'
    elif isinstance(value, float) or re.fullmatch(r"\d+\.\d+", _text(value)):
        hint = "write labels as whole numbers; unlabelled: under data leaves out rows without one"
    elif own or isinstance(value, str):
        hint = _DECIDE
    # Where the data names its classes, its indices mean these names.
    in_data = own or list(dict.fromkeys(map(_text, values)))
    return BadInput(
        f"{table.where(row)}: the label is not one of the classes",
        expected=f"{number}one of {_some([printable(label) for label in labels])}",
        found=repr(value)[:_LONGEST],
        details=_lists(in_data, labels),
        hint=hint,
    )


def _lists(in_data: Iterable[str], labels: Sequence[str]) -> tuple[str, str]:
    """Both lists of names, for an error."""
    data = [printable(name[:_LONGEST]) for name in in_data]
    return (
        f"in the data: {_some(data)}",
        f"classes of the task: {_some([printable(label) for label in labels])}",
    )


def _key(value: object) -> tuple[str, object]:
    """A key for any value: true, 1 and 1.0 differ."""
    plain = isinstance(value, (str, int, float))
    return type(value).__name__, value if plain else repr(value)


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    return str(value).lower() if isinstance(value, bool) else str(value)


def _folded(name: str) -> str:
    """The same text for all cases and Unicode forms of a name; `_` is a space."""
    decomposed = unicodedata.normalize("NFD", name.replace("_", " ")).casefold()
    return unicodedata.normalize("NFC", decomposed).strip()


def _resembles(name: str, label: str) -> bool:
    """True if the words of a name, or their beginnings, are among the words of a label."""
    words = re.findall(r"\w+", _folded(label))
    own = re.findall(r"\w+", _folded(name))
    return bool(own) and all(
        any(word == one or (len(one) >= 3 and word.startswith(one)) for word in words)
        for one in own
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown}, ... ({len(names)} in all)"
