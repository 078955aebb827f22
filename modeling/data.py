"""The data of a task: which rows there are, what a row's input and class are, and what to tune on.

A `DataSpec` names files, folders or splits; `TaskData` opens them. Rows keep the order of
their files, everything random is seeded, and nothing is guessed: an unknown column, split or
label is an error that lists what there is. Code that comes with a data set is never run.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from merging.digests import digest_bytes, digest_json
from merging.errors import BadInput
from merging.progress import Progress
from modeling.imagenet import are_synsets, synset_classes
from modeling.images import image_bytes, open_image
from modeling.tables import ListTable, Table, open_table, split_origin

SPLITS = ("train", "validation", "test")
HOLDOUT_SHARE = 0.2
HOLDOUT_MOST = 1000
HOLDOUT_SEED = 0  # fixed: which rows are set apart must not depend on a method's seed

Modality = Literal["text", "image"]


@dataclass(frozen=True)
class DataSpec:
    """Where a task's rows are.

    Attributes:
        path: a folder, or a data set on the hub, `owner/name[:config]`.
        train: a file or folder in `path`, or the name of a split; likewise the next two.
        validation: rows to tune on.
        test: rows to report on.
        input: the column or columns that hold the input; two texts are a sentence pair.
        label: the column with the class index or a name in the head's labels.
        revision: for the hub, the commit.
    """

    path: str
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    input: tuple[str, ...] = ("text",)
    label: str | None = "label"
    revision: str | None = None

    def __post_init__(self) -> None:
        if not self.input:
            raise BadInput("data names no input column", hint="set input: to a column")

    def source(self, split: str) -> str | None:
        """What the specification says for `train`, `validation` or `test`."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[split]


@dataclass(frozen=True)
class Example:
    """One row, ready for a preprocessor.

    Attributes:
        inputs: texts, or one `PIL.Image.Image`.
        label: the index of its class, None where the data has no labels.
        where: file and row, for errors.
    """

    inputs: tuple[Any, ...]
    label: int | None
    where: str


@dataclass(frozen=True)
class Rows:
    """Some rows of one table, in order.

    Attributes:
        table: where they come from.
        inputs: the input columns.
        label: the label column, None where there is none.
        labels: the names of the classes.
        modality: how inputs are read.
        indices: the rows of the table; None is all of them.
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

    def batches(self, size: int) -> Iterator[list[Example]]:
        """All rows in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield [self[position] for position in range(start, min(start + size, len(self)))]

    def select(self, positions: Sequence[int] | NDArray[np.int64]) -> "Rows":
        """The rows at these positions, in the given order."""
        chosen = np.asarray(positions, dtype=np.int64)
        base = np.arange(len(self.table)) if self.indices is None else self.indices
        return replace(self, indices=base[chosen], _memo={})

    @property
    def targets(self) -> NDArray[np.int64]:
        """The class index of every row; reads no inputs."""
        if "targets" not in self._memo:
            if self.label is None:
                raise BadInput(
                    f"{self.table.name} is used without labels", hint="set label: to a column"
                )
            everything = _class_indices(self.table, self.label, self.labels)
            self._memo["targets"] = everything if self.indices is None else everything[self.indices]
        result: NDArray[np.int64] = self._memo["targets"]
        return result

    def lengths(self) -> NDArray[np.int64]:
        """How many characters each row's texts have together."""
        rows = range(len(self.table)) if self.indices is None else self.indices.tolist()
        return np.array(
            [sum(len(str(v)) for v in self.table.row(row, self.inputs)) for row in rows],
            dtype=np.int64,
        )

    def in_memory(self) -> "Rows":
        """The same rows, read once in the table's order; for few rows that are read often."""
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
        """The digest of what the rows hold: raw inputs and classes, not where they lie."""
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


class TaskData:
    """The data of a task, opened.

    Args:
        spec: where it is.
        labels: the names of the classes; empty where the data has no labels.
        modality: what the family reads.
    """

    def __init__(self, spec: DataSpec, labels: Sequence[str], modality: Modality) -> None:
        self.spec = spec
        self.labels = tuple(labels)
        self.modality = modality

    @property
    def validation_from_train(self) -> bool:
        """Whether validation rows are set apart from train: the model may have seen them."""
        return self.spec.validation is None and self.spec.train is not None

    @property
    def splits(self) -> tuple[str, ...]:
        """Those of train, validation and test that have rows."""
        given = [s for s in SPLITS if self.spec.source(s) is not None]
        if self.validation_from_train:
            given.append("validation")
        return tuple(s for s in SPLITS if s in given)

    @property
    def evaluation_split(self) -> str | None:
        """What results are reported on: test if given, else validation."""
        return next((s for s in ("test", "validation") if s in self.splits), None)

    def rows(self, split: str) -> Rows:
        """The rows of train, validation or test.

        Raises:
            BadInput: the split is not described, cannot be read or is empty.
        """
        if split == "train" and self.validation_from_train:
            return self._train.select(self._parts[0])
        if split == "validation" and self.validation_from_train:
            return self._train.select(self._parts[1])
        if split == "train" and self.spec.train is not None:
            return self._train
        return self._open(split)

    def calibration(self, shots: int, seed: int) -> Rows:
        """`shots` rows of each class of train, all where there are fewer, in a seeded order.

        Rows that stand in for validation are never among them. Without labels: `shots` rows.
        """
        if self.spec.train is None:
            raise BadInput(
                f"the data in {self.spec.path} has no train rows",
                hint="localizing with data needs train:; without it use mode: dataless",
            )
        rows = self.rows("train")
        random = np.random.default_rng(seed)
        if rows.label is None:
            return rows.select(random.permutation(len(rows))[:shots]).in_memory()
        chosen = [
            random.permutation(np.flatnonzero(rows.targets == index))[:shots]
            for index in range(len(self.labels))
        ]
        return rows.select(random.permutation(np.concatenate(chosen))).in_memory()

    def digest(self, progress: Progress | None = None) -> dict[str, object]:
        """What the splits are read from, by content, for keys: no paths of this machine."""
        return data_digest(self.spec, progress)

    @cached_property
    def _train(self) -> Rows:
        return self._open("train")

    @cached_property
    def _parts(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        targets = (
            np.zeros(len(self._train), dtype=np.int64)
            if self._train.label is None
            else self._train.targets
        )
        return set_apart(targets)

    def _open(self, split: str) -> Rows:
        return open_split(self.spec, split, labels=self.labels, modality=self.modality)


def open_split(
    spec: DataSpec, split: str, *, labels: Sequence[str] = (), modality: Modality = "text"
) -> Rows:
    """The rows of one described split.

    Args:
        spec: where they are.
        split: train, validation or test.
        labels: the names of the classes; a label column is checked against them at once.
        modality: how inputs are read.

    Raises:
        BadInput: it is not described, cannot be read, is empty, lacks a column, or has a label
            outside of the classes.
    """
    source = spec.source(split)
    if source is None:
        raise BadInput(
            f"the data in {spec.path} describes no {split} rows",
            found=", ".join(s for s in SPLITS if spec.source(s)) or "no split at all",
            hint=f"set {split}: to a file in path or to a split's name",
        )
    table = open_table(spec.path, source, revision=spec.revision)
    if len(table) == 0:
        raise BadInput(f"{table.name} has no rows", expected="at least one")
    wanted = [*spec.input, *([spec.label] if spec.label is not None and labels else [])]
    missing = [column for column in wanted if column not in table.columns]
    if missing:
        raise BadInput(
            f"{table.name} has no column {', '.join(map(repr, missing))}",
            found=f"columns {', '.join(table.columns)}",
            hint="set input: and label: to columns that are there",
        )
    rows = Rows(table, spec.input, spec.label if labels else None, tuple(labels), modality)
    if rows.label is not None:
        _ = rows.targets
    return rows


def labels_of(spec: DataSpec) -> tuple[str, ...]:
    """The names of the classes as the data itself gives them (`labels_from: dataset`)."""
    for split in SPLITS:
        source = spec.source(split)
        if source is None or spec.label is None:
            continue
        table = open_table(spec.path, source, revision=spec.revision)
        names = table.class_names(spec.label)
        if names is not None:
            return names
    raise BadInput(
        f"the data in {spec.path} does not name its classes",
        hint="list them under head: labels",
    )


def set_apart(targets: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The positions that stay in train and those that stand in for validation, both ascending.

    A seeded share of each class, at most `HOLDOUT_MOST` rows together; every class keeps at
    least one row in train.
    """
    random = np.random.default_rng(HOLDOUT_SEED)
    share = min(HOLDOUT_SHARE, HOLDOUT_MOST / max(len(targets), 1))
    held = []
    for index in np.unique(targets):
        members = np.flatnonzero(targets == index)
        count = min(int(share * len(members)), len(members) - 1)
        held.append(random.permutation(members)[:count])
    apart = np.sort(np.concatenate(held)) if held else np.empty(0, dtype=np.int64)
    return np.setdiff1d(np.arange(len(targets)), apart), apart


def data_digest(spec: DataSpec, progress: Progress | None = None) -> dict[str, object]:
    """What each split is read from, by content: files with their digests, hub ids by commit."""
    splits = {
        split: split_origin(
            spec.path, source, inputs=spec.input, revision=spec.revision, progress=progress
        )
        for split in SPLITS
        if (source := spec.source(split)) is not None
    }
    return {"splits": splits, "input": list(spec.input), "label": spec.label}


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise BadInput(
            f"{where} holds no text", expected="a string", found=f"{type(value).__name__} {value!r}"
        )
    return value


def _class_indices(table: Table, column: str, labels: tuple[str, ...]) -> NDArray[np.int64]:
    """The class index of every row: an index stays, a name is looked up.

    Where the data names its classes and all of these names are labels, they decide, not the
    data's own order. Folders named by synset ids are classes in their sorted order.
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
        value = translated.get(raw, raw)
        index = _class_index(value, names, len(labels))
        if index is None:
            raise BadInput(
                f"{table.where(row)}: label outside of the classes",
                expected=f"an index below {len(labels)} or one of {_some(labels)}",
                found=repr(value),
                hint="check label: and head: labels",
            )
        if isinstance(value, str) and labels.count(value) > 1:
            raise BadInput(
                f"{table.where(row)}: label {value!r} names several classes",
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
