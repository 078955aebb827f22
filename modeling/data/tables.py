"""Tables of rows with one small interface; values are raw, nothing is decoded.

`locate` finds the files of a split; reading and the digest both use it. Files are read directly,
without a cache; only hub ids go through `datasets`. Code of a data set is never run.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from restitch.merging.digests import digest_file
from restitch.merging.errors import BadInput
from restitch.modeling.data.csv_files import CsvFormat
from restitch.modeling.data.file_kinds import left_out, printable, table_kind
from restitch.modeling.data.images import named_file
from restitch.modeling.data.locate import locate
from restitch.modeling.data.location import Location
from restitch.modeling.data.records import read_records
from restitch.registry.specs.data import Modality

# The column of `datasets` that names the image of a row.
FILE_NAME = "file_name"


class Table(Protocol):
    """Rows with named columns.

    Attributes:
        name: its name in errors.
        root: the folder that image paths are relative to.
        columns: in the order of the file.
        typed: false if numbers are strings, too, as in CSV.
        notes: sentences about what the file or folder has and the table does not.
        synsets: the file that gives the class of each synset folder, if there is one.
    """

    name: str
    root: Path
    columns: tuple[str, ...]
    typed: bool
    notes: tuple[str, ...]
    synsets: Path | None

    def __len__(self) -> int: ...

    def row(self, index: int, columns: Sequence[str]) -> tuple[Any, ...]:
        """The values of one row."""

    def column(self, name: str) -> Sequence[Any]:
        """All values of one column; used for labels only, which are small."""

    def named_files(self, column: str) -> Iterator[str]:
        """The names of files that stand in a column in place of the images."""

    def where(self, index: int) -> str:
        """The name of a row in errors."""

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """The names of the classes, if the data set has them."""


class ListTable:
    """A table in memory."""

    def __init__(
        self,
        name: str,
        root: Path,
        values: Mapping[str, Sequence[Any]],
        *,
        wheres: Sequence[str] | None = None,
        names: Mapping[str, tuple[str, ...]] | None = None,
        synsets: Path | None = None,
        typed: bool = True,
        notes: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.root = root
        self.columns = tuple(values)
        self._values = values
        self._wheres = wheres
        self._names = names or {}
        self.synsets = synsets
        self.typed = typed
        self.notes = tuple(notes)

    def __len__(self) -> int:
        return len(next(iter(self._values.values()), ()))

    def row(self, index: int, columns: Sequence[str]) -> tuple[Any, ...]:
        """The values of one row."""
        return tuple(self._values[column][index] for column in columns)

    def column(self, name: str) -> Sequence[Any]:
        """All values of one column."""
        return self._values[name]

    def named_files(self, column: str) -> Iterator[str]:
        """The names of files in a column."""
        yield from (value for value in self._values[column] if isinstance(value, str))

    def where(self, index: int) -> str:
        """File and row."""
        return self._wheres[index] if self._wheres else f"{self.name} row {index}"

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """The names of the classes, if the data set has them."""
        return self._names.get(column)


class TablePart:
    """Some rows of another table, in the given order."""

    def __init__(self, table: Table, rows: Sequence[int]) -> None:
        self._table, self._rows = table, rows
        self.name, self.root, self.columns = table.name, table.root, table.columns
        self.typed, self.notes, self.synsets = table.typed, table.notes, table.synsets

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int, columns: Sequence[str]) -> tuple[Any, ...]:
        """The values of one row."""
        return self._table.row(self._rows[index], columns)

    def column(self, name: str) -> Sequence[Any]:
        """All values of one column."""
        values = self._table.column(name)
        return [values[row] for row in self._rows]

    def named_files(self, column: str) -> Iterator[str]:
        """The names of files in a column."""
        yield from (value for value in self.column(column) if isinstance(value, str))

    def where(self, index: int) -> str:
        """File and row."""
        return self._table.where(self._rows[index])

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """The names of the classes, if the data set has them."""
        return self._table.class_names(column)


def open_table(
    path: str, source: str, *, revision: str | None = None, form: CsvFormat | None = None
) -> Table:
    """Open the rows behind a `path` and a split.

    Args:
        path: a folder, or an id on the hub.
        source: the split.
        revision: for the hub, the commit.
        form: what the task says about CSV files.

    Raises:
        BadInput: there is nothing of that name, or it cannot be read.
    """
    location = locate(path, source, revision=revision)
    if location.kind == "hub":
        from restitch.modeling.data.hub import HubTable, open_hub

        found = open_hub(location)
        if isinstance(found, HubTable):
            return found
        form = form or CsvFormat()
        return _read_rows(
            found.location,
            replace(form, delimiter=form.delimiter or found.delimiter),
            found.classes,
        )
    return _open_local(location, form)


def _open_local(location: Location, form: CsvFormat | None) -> Table:
    root = Path(location.root)
    if location.kind == "images":
        return _image_folder(root, location)
    table: Table
    if table_kind(location.files[0]) in (".parquet", ".arrow"):
        from restitch.modeling.data.arrow_tables import ArrowTable

        table = ArrowTable(root, [root / name for name in location.files])
    else:
        table = _read_rows(location, form)
    table.notes = (*location.notes, *table.notes, *_unlisted(table, location))
    return table


def _read_rows(
    location: Location,
    form: CsvFormat | None,
    classes: Mapping[str, tuple[str, ...]] | None = None,
) -> ListTable:
    """The rows of text files; `classes` are the names that the data set gives to its classes."""
    root = Path(location.root)
    records: list[Mapping[str, Any]] = []
    wheres: list[str] = []
    notes: list[str] = []
    for name in location.files:
        found, more = read_records(root / name, form)
        notes += more
        for row, record in enumerate(found):
            records.append(record)
            wheres.append(f"{printable(name)} row {row}")
    columns = list(dict.fromkeys(key for record in records for key in record))
    values = {column: [record.get(column) for record in records] for column in columns}
    for column in values.keys() & (classes or {}).keys():
        # Indices into the names, which CSV writes as texts.
        values[column] = [_number(value, (classes or {})[column]) for value in values[column]]
    typed = table_kind(location.files[0]) not in (".csv", ".tsv")
    title = ", ".join(map(printable, location.files))
    return ListTable(title, root, values, wheres=wheres, names=classes, typed=typed, notes=notes)


def _number(value: object, names: Sequence[str]) -> object:
    is_index = isinstance(value, str) and re.fullmatch(r"-?\d{1,9}", value) and value not in names
    return int(str(value)) if is_index else value


def _unlisted(table: Table, location: Location) -> list[str]:
    """A note about the images of a folder that its table does not list."""
    if not location.listed:
        return []
    column = FILE_NAME if FILE_NAME in table.columns else "image"
    named = set(table.named_files(column)) if column in table.columns else set()
    others = [name for name in location.listed if name not in named]
    return left_out(Path(location.root), [], others, f"not listed in {location.files[0]}")


def split_origin(
    path: str,
    source: str,
    *,
    inputs: Sequence[str] = (),
    revision: str | None = None,
    form: CsvFormat | None = None,
    modality: Modality = "image",
) -> dict[str, object]:
    """The content of a split, as plain values to digest.

    Args:
        path: as in `open_table`.
        source: the split.
        inputs: the input columns; the image files that they name belong to the content.
        revision: for the hub, the commit.
        form: what the task says about CSV files.
        modality: texts name no files.
    """
    location = locate(path, source, revision=revision)
    if location.kind == "hub":
        return {
            "hub": location.root,
            "config": location.config,
            "revision": location.revision,
            "split": location.split,
        }
    root = Path(location.root)
    names = list(location.files)
    if modality == "image" and location.kind != "images":
        names += _named_images(_open_local(location, form), inputs)
    origin: dict[str, object] = {"files": [[name, _digest(root / name)] for name in names]}
    if location.synsets is not None:
        origin["synsets"] = _digest(Path(location.synsets))
    return origin


def _digest(file: Path) -> str:
    try:
        return digest_file(file)
    except OSError as error:
        raise BadInput(f"{file} cannot be read", found=error.strerror) from error


def _named_images(table: Table, inputs: Sequence[str]) -> list[str]:
    """The image files that the rows of a table name, sorted."""
    named = {
        path
        for column in image_columns(table, inputs)
        if column in table.columns
        for name in table.named_files(column)
        if (path := named_file(name, table.root)) is not None
    }
    return sorted(path.as_posix() for path in named if _is_file(table.root / path))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no name of a file; reported with its row
        return False


def image_columns(table: Table, inputs: Sequence[str]) -> tuple[str, ...]:
    """The columns with the inputs; `file_name` stands for `image`, as in `datasets`."""
    if tuple(inputs) == ("image",) and "image" not in table.columns and FILE_NAME in table.columns:
        return (FILE_NAME,)
    return tuple(inputs)


def _image_folder(root: Path, location: Location) -> ListTable:
    """One row per image; its folder is its class."""
    files = location.files
    folders = [name.split("/")[0] if "/" in name else "" for name in files]
    if "" in folders:
        raise BadInput(
            f"{root} has an image outside of the class folders",
            found=printable(files[folders.index("")]),
            hint="put the images of each class into a folder of its own",
        )
    names = tuple(sorted(set(folders), key=lambda name: name.encode()))
    for name, folder in zip(files, folders, strict=True):
        inner = [part for part in name.split("/")[1:-1] if part in names and part != folder]
        if inner:
            raise BadInput(
                f"{root / name} lies in the folders of two classes",
                found=f"{folder} and {inner[0]}",
                hint="move it into one of them",
            )
    values = {"image": list(files), "label": folders}
    synsets = None if location.synsets is None else Path(location.synsets)
    return ListTable(
        root.name,
        root,
        values,
        wheres=[printable(name) for name in files],
        names={"label": names},
        synsets=synsets,
        notes=location.notes,
    )
