"""The data of a task: the rows to calibrate, tune and report on.

A `DataSpec` names files, folders or splits; `TaskData` opens them. Everything random is seeded,
and nothing is guessed: an unknown column, split or label is an error that lists the known ones.
Rows that stand in for a missing validation split never take part in calibration.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from restitch.merging.errors import BadInput
from restitch.modeling.data.csv_files import CsvFormat
from restitch.modeling.data.file_kinds import printable
from restitch.modeling.data.labels import Classes, labelled_rows
from restitch.modeling.data.rows import Example as Example
from restitch.modeling.data.rows import Prompt as Prompt
from restitch.modeling.data.rows import Rows as Rows
from restitch.modeling.data.tables import (
    Table,
    TablePart,
    image_columns,
    open_table,
    split_origin,
)
from restitch.registry.specs.data import DataSpec, Modality
from restitch.registry.specs.hub_id import split_pin
from restitch.registry.specs.prompt import MASK

SPLITS = ("train", "validation", "test")
HOLDOUT_SHARE = 0.2
HOLDOUT_MOST = 1000
HOLDOUT_SEED = 0  # fixed: which rows are set apart must not depend on a method's seed


class TaskData:
    """The data of a task, opened.

    Args:
        spec: where the rows are.
        labels: the names of the classes; empty if the data has no labels.
        modality: what the family reads.
        prompt: how rows become questions, for a family that reads prompts.
        of_numbers: the label column has numbers, not classes.
    """

    def __init__(
        self,
        spec: DataSpec,
        labels: Sequence[str],
        modality: Modality,
        prompt: Prompt | None = None,
        of_numbers: bool = False,
    ) -> None:
        self.spec = spec.with_columns(modality)
        self.labels = tuple(labels)
        self.modality = modality
        self.prompt = prompt
        self.of_numbers = of_numbers

    @property
    def validation_from_train(self) -> bool:
        """True if validation rows are set apart from train: the model may have seen them."""
        return self.spec.validation is None and self.spec.train is not None

    @property
    def splits(self) -> tuple[str, ...]:
        """Those of train, validation and test that have rows."""
        given = [s for s in SPLITS if self.spec.source(s) is not None]
        if self.validation_from_train:
            given.append("validation")
        return tuple(s for s in SPLITS if s in given)

    def rows(self, split: str) -> Rows:
        """The rows of train, validation or test.

        Raises:
            BadInput: the split is not described, cannot be read or is empty.
        """
        if split == "train" and self.validation_from_train:
            return self._train.select(self._parts[0])
        if split == "validation" and self.validation_from_train:
            if len(self._parts[1]) == 0:
                raise BadInput(
                    f"{self._train.table.name} has too few rows to set some apart for validation",
                    expected="at least two rows of a class",
                    hint="give validation: or test:",
                )
            return self._train.select(self._parts[1])
        if split == "train" and self.spec.train is not None:
            return self._train
        return self._open(split)

    def calibration(self, shots: int, seed: int) -> Rows:
        """`shots` rows of each class of train, all where there are fewer, in a seeded order.

        Rows that stand in for validation are never among them. Without labels: `shots` rows for
        each of the classes. Rows of numbers are all of one class.
        """
        if self.spec.train is None:
            raise BadInput(
                f"the data in {self.spec.path} has no train rows",
                hint="localizing with data needs train:; without it use mode: dataless",
            )
        rows = self.rows("train")
        random = _random(seed)
        if rows.label is None or rows.of_numbers:
            count = shots * max(1, rows.class_count)
            return rows.select(random.permutation(len(rows))[:count]).in_memory()
        chosen = [
            random.permutation(np.flatnonzero(rows.targets == index))[:shots]
            for index in range(rows.class_count)
        ]
        return rows.select(random.permutation(np.concatenate(chosen))).in_memory()

    @cached_property
    def _train(self) -> Rows:
        return self._open("train")

    @cached_property
    def _parts(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return set_apart(self._train.strata, self.spec.holdout)

    def _open(self, split: str) -> Rows:
        return open_split(
            self.spec,
            split,
            labels=self.labels,
            modality=self.modality,
            prompt=self.prompt,
            of_numbers=self.of_numbers,
        )


def open_split(
    spec: DataSpec,
    split: str,
    *,
    labels: Sequence[str] = (),
    modality: Modality = "text",
    prompt: Prompt | None = None,
    of_numbers: bool = False,
) -> Rows:
    """The rows of one described split.

    If the task has rows of its own to evaluate on, its train rows may lack the label column: they
    then serve as inputs to calibrate with. Rows that `unlabelled` marks are left out.

    Args:
        spec: where the rows are.
        split: train, validation or test.
        labels: the names of the classes; a label column is checked against them at once.
        modality: how inputs are read.
        prompt: how rows become questions.
        of_numbers: the label column has numbers, not classes.

    Raises:
        BadInput: the split is not described, cannot be read, is empty, lacks a column, or has a
            label outside of the classes or no label at all.
    """
    spec = spec.with_columns(modality)
    source = spec.source(split)
    if source is None:
        raise BadInput(
            f"the data in {spec.path} has no {split} rows",
            expected=f"the key {split} under data",
            found=", ".join(s for s in SPLITS if spec.source(s)) or "no split at all",
            hint=f"set {split}: to a file in path or to the name of a split",
        )
    table = _open_source(spec, source)
    if len(table) == 0:
        raise BadInput(f"{table.name} has no rows", expected="at least one")
    own = None if prompt is None else prompt.choices_column
    label = spec.label if labels or own is not None or of_numbers else None
    if prompt is not None and prompt.answer is not None:
        label = prompt.answer
    evaluated = spec.validation is not None or spec.test is not None
    if split == "train" and evaluated and label not in table.columns:
        label = None
    inputs = image_columns(table, spec.input) if modality == "image" else spec.input
    requested = [*inputs, *(name for name in (label, own) if name is not None)]
    missing = [column for column in requested if column not in table.columns]
    if missing:
        raise BadInput(
            f"{table.name} has no column {', '.join(map(repr, missing))}",
            found=f"columns {', '.join(map(printable, table.columns))}",
            hint=_nearest(missing[0], table.columns, prompt is not None),
        )
    left_out = 0
    if label is not None and spec.unlabelled is not None:
        classes = Classes(tuple(labels), spec.classes)
        labelled = labelled_rows(table, label, spec.unlabelled, classes)
        left_out = len(table) - len(labelled)
        table = TablePart(table, labelled)
    rows = Rows(
        table,
        inputs,
        label,
        tuple(labels),
        modality,
        classes=spec.classes,
        prompt=prompt,
        of_numbers=of_numbers,
        left_out=left_out,
    )
    if rows.label is not None:
        _ = rows.targets
    return rows


def _nearest(missing: str, columns: Sequence[str], in_prompt: bool) -> str:
    """What to do about a missing column."""
    advice = "set input: and label: to columns that are there"
    if in_prompt:
        advice = "name columns that are there in prompt:, choices_column:, answer: and data: label"
    if in_prompt and missing == MASK:
        return f"{advice}; {{mask}} is the place of the answer only in a line of masked-lm"
    same = [name for name in columns if name.strip().casefold() == missing.casefold()]
    near = same or get_close_matches(missing, columns, n=1, cutoff=0.7)
    if near:
        return f"did you mean {near[0]!r}? {advice}"
    return f"{advice}; a CSV file begins with their names"


def labels_of(spec: DataSpec) -> tuple[str, ...]:
    """The names of the classes that the data set gives (`labels_from: dataset`).

    Raises:
        BadInput: it gives none.
    """
    for split in SPLITS:
        source = spec.source(split)
        if source is None:
            continue
        names = _open_source(spec, source).class_names(spec.label or "label")
        if names is not None:
            return names
    raise BadInput(
        f"the data in {spec.path} does not name its classes",
        hint="list them under head: labels",
    )


def set_apart(
    targets: NDArray[np.int64], holdout: float | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split train into positions that stay and positions for validation, both ascending.

    A seeded share of each class, at least one row where the class has two; every class keeps a row
    in train.

    Args:
        targets: the classes of the rows.
        holdout: the share; by default `HOLDOUT_SHARE`, and at most `HOLDOUT_MOST` rows together.
    """
    random = _random(HOLDOUT_SEED)
    most = HOLDOUT_MOST if holdout is None else len(targets)
    share = holdout or min(HOLDOUT_SHARE, HOLDOUT_MOST / max(len(targets), 1))
    held = [np.empty(0, dtype=np.int64)]
    for index in np.unique(targets):
        members = np.flatnonzero(targets == index)
        count = min(max(int(share * len(members)), 1), len(members) - 1)
        held.append(random.permutation(members)[:count])
    apart = np.sort(random.permutation(np.concatenate(held))[:most])
    return np.setdiff1d(np.arange(len(targets)), apart), apart


def stratified(targets: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """The positions of `count` rows, ascending, of which each class has its share.

    Shares are rounded by largest remainder, the lower class first; the same seed gives the
    same rows forever. All rows if there are no more than `count`.
    """
    if count >= len(targets):
        return np.arange(len(targets))
    random = _random(seed)
    classes, sizes = np.unique(targets, return_counts=True)
    taken, rest = np.divmod(sizes * count, len(targets))
    taken[np.argsort(-rest, kind="stable")[: count - int(taken.sum())]] += 1
    chosen = [
        random.permutation(np.flatnonzero(targets == index))[:number]
        for index, number in zip(classes, taken, strict=True)
    ]
    return np.sort(np.concatenate(chosen))


def data_digest(spec: DataSpec, modality: Modality = "image") -> dict[str, object]:
    """The content of each split, without local paths: the digests of files, the commit on the hub.

    Args:
        spec: the data, with its columns filled in.
        modality: how inputs are read; images may be files that a table names.
    """
    path, revision = split_pin(spec.path)
    splits = {
        split: split_origin(
            path,
            source,
            inputs=spec.input,
            revision=revision,
            form=_form(spec),
            modality=modality,
        )
        for split in SPLITS
        if (source := spec.source(split)) is not None
    }
    content: dict[str, object] = {"splits": splits, "input": list(spec.input), "label": spec.label}
    # Settings that are not used leave the digest as it is.
    read_as = {
        "classes": None if spec.classes is None else list(spec.classes),
        "unlabelled": spec.unlabelled,
        "delimiter": spec.delimiter,
        "quotes": spec.quotes,
        "holdout": spec.holdout,
    }
    given = {name: value for name, value in read_as.items() if value is not None}
    return content | ({"read_as": given} if given else {})


def _open_source(spec: DataSpec, source: str) -> Table:
    path, revision = split_pin(spec.path)
    return open_table(path, source, revision=revision, form=_form(spec))


def _form(spec: DataSpec) -> CsvFormat:
    return CsvFormat(spec.delimiter, spec.quotes)


def _random(seed: int) -> np.random.RandomState:
    """The same numbers for a seed in every version of numpy, unlike `Generator`."""
    return np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32])
