"""Tables of rows with one small interface; values are raw, nothing is decoded.

`locate` decides what a `path` and a split mean: a file, several shards, a folder of images or of
arrow files, a split of a data set on disk or on the hub. Reading and the digest both use it, so a
key always identifies the bytes that were read. Files are read directly, without a cache; only hub
ids go through `datasets`. Code of a data set is never run.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from restitch.merging.digests import digest_file
from restitch.merging.errors import BadInput
from restitch.modeling.data.imagenet import SYNSETS_FILE
from restitch.modeling.data.location import Location
from restitch.modeling.data.records import read_records

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
TABLE_SUFFIXES = (".arrow", ".csv", ".json", ".jsonl", ".parquet", ".tsv")


class Table(Protocol):
    """Rows with named columns.

    Attributes:
        name: its name in errors.
        root: the folder that image paths are relative to.
        columns: in the order of the file.
        synsets: the file that gives the class of each synset folder, if there is one.
    """

    name: str
    root: Path
    columns: tuple[str, ...]
    synsets: Path | None

    def __len__(self) -> int: ...

    def row(self, index: int, columns: Sequence[str]) -> tuple[Any, ...]:
        """The values of one row."""

    def column(self, name: str) -> Sequence[Any]:
        """All values of one column; used for labels only, which are small."""

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
    ) -> None:
        self.name = name
        self.root = root
        self.columns = tuple(values)
        self._values = values
        self._wheres = wheres
        self._names = names or {}
        self.synsets = synsets

    def __len__(self) -> int:
        return len(next(iter(self._values.values()), ()))

    def row(self, index: int, columns: Sequence[str]) -> tuple[Any, ...]:
        """The values of one row."""
        return tuple(self._values[column][index] for column in columns)

    def column(self, name: str) -> Sequence[Any]:
        """All values of one column."""
        return self._values[name]

    def where(self, index: int) -> str:
        """File and row."""
        return self._wheres[index] if self._wheres else f"{self.name} row {index}"

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """The names of the classes, if the data set has them."""
        return self._names.get(column)


def open_table(path: str, source: str, *, revision: str | None = None) -> Table:
    """Open the rows behind a `path` and a split.

    Raises:
        BadInput: there is nothing of that name, or it cannot be read.
    """
    location = locate(path, source, revision=revision)
    if location.kind == "hub":
        from restitch.modeling.data.hub import open_hub

        return open_hub(location)
    root = Path(location.root)
    if location.kind == "images":
        return _image_folder(root, location)
    if location.kind == "arrow":
        from restitch.modeling.data.arrow_tables import open_arrow_folder

        return open_arrow_folder(root)
    suffix = Path(location.files[0]).suffix.lower()
    if suffix in (".parquet", ".arrow"):
        from restitch.modeling.data.arrow_tables import open_arrow_files

        return open_arrow_files(root, [root / name for name in location.files])
    return _read_rows(location)


def _read_rows(location: Location) -> ListTable:
    root = Path(location.root)
    files = [root / name for name in location.files]
    records: list[Mapping[str, Any]] = []
    wheres: list[str] = []
    for file in files:
        for row, record in enumerate(read_records(file)):
            records.append(record)
            wheres.append(f"{file.name} row {row}")
    columns = list(dict.fromkeys(key for record in records for key in record))
    values = {column: [record.get(column) for record in records] for column in columns}
    return ListTable(", ".join(f.name for f in files), root, values, wheres=wheres)


def split_origin(
    path: str,
    source: str,
    *,
    inputs: Sequence[str] = (),
    revision: str | None = None,
) -> dict[str, object]:
    """The content of a split, as plain values to digest.

    Args:
        path: as in `open_table`.
        source: the split.
        inputs: the input columns; the image files that they name belong to the content.
        revision: for the hub, the commit.
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
    names = [*location.files, *_named_images(location, inputs)]
    origin: dict[str, object] = {"files": [[name, digest_file(root / name)] for name in names]}
    if location.synsets is not None:
        origin["synsets"] = digest_file(Path(location.synsets))
    return origin


def _named_images(location: Location, inputs: Sequence[str]) -> list[str]:
    """The image files that the rows of a text table name, sorted."""
    if Path(location.files[0]).suffix.lower() in (".parquet", ".arrow"):
        return []  # images lie inside
    if location.kind != "table":
        return []
    table = _read_rows(location)
    named = {
        value
        for column in inputs
        if column in table.columns
        for value in table.column(column)
        if isinstance(value, str) and value.lower().endswith(IMAGE_SUFFIXES)
    }
    places = {(table.root / name) for name in named}
    inside = (place for place in places if place.is_relative_to(table.root) and place.is_file())
    return sorted(place.relative_to(table.root).as_posix() for place in inside)


def locate(path: str, source: str, *, revision: str | None = None) -> Location:
    """Decide what a `path` and a split mean; an existing local path wins.

    Raises:
        BadInput: there is nothing of that name; lists what there is.
    """
    root = Path(path)
    if not root.exists():
        from restitch.modeling.data.hub import locate_on_hub

        return locate_on_hub(path, source, revision=revision)
    if root.is_file():
        raise BadInput(
            f"the path of the data, {path}, is a file",
            expected="a folder",
            hint=f"set path: {root.parent} and name {root.name} as train, validation or test",
        )
    target = root / source
    if target.is_file():
        _check_suffix(target)
        return Location("table", str(target.parent), (target.name,))
    if target.is_dir():
        return _locate_folder(target, root)
    files = sorted(
        entry.name
        for entry in root.iterdir()
        if entry.suffix.lower() in TABLE_SUFFIXES and _is_split_file(entry.stem, source)
    )
    kinds = {Path(name).suffix.lower() for name in files}
    if len(kinds) > 1:
        raise BadInput(
            f"{source!r} in {path} is ambiguous",
            found=", ".join(files),
            hint="give the whole name of the file",
        )
    if files:
        return Location("table", str(root), tuple(files))
    raise BadInput(
        f"there is no file, folder or split {source!r} in {path}",
        found=_content(root),
        hint="set train:, validation: or test: to one of these names",
    )


def _locate_folder(folder: Path, root: Path) -> Location:
    if (folder / "state.json").is_file():
        # Not state.json: it holds a fingerprint that changes without the rows.
        return Location("arrow", str(folder), tuple(sorted(f.name for f in folder.glob("*.arrow"))))
    tables = sorted(
        f.name for f in folder.iterdir() if f.is_file() and f.suffix.lower() in TABLE_SUFFIXES
    )
    images = sorted(_images(folder))
    listing = [name for name in tables if Path(name).stem == "metadata"]
    if images and listing:
        tables = listing  # one row per image, in the form of `datasets`
    elif images:
        places = (folder / SYNSETS_FILE, root / SYNSETS_FILE)
        synsets = next((str(file) for file in places if file.is_file()), None)
        return Location("images", str(folder), tuple(images), synsets)
    kinds = {Path(name).suffix.lower() for name in tables}
    if len(kinds) == 1:
        return Location("table", str(folder), tuple(tables))
    scripts = any(f.suffix == ".py" for f in folder.iterdir())
    raise BadInput(
        f"{folder} does not hold data in a known form",
        expected=f"images in folders of classes, or one kind of {', '.join(TABLE_SUFFIXES)}",
        found=_content(folder),
        hint="scripts of data sets are never run; save the rows as a file" if scripts else None,
    )


def _images(folder: Path) -> Iterator[str]:
    for entry in folder.rglob("*"):
        if entry.suffix.lower() in IMAGE_SUFFIXES and entry.is_file():
            yield entry.relative_to(folder).as_posix()


def _image_folder(root: Path, location: Location) -> ListTable:
    """One row per image; its folder is its class."""
    files = location.files
    folders = [name.split("/")[0] if "/" in name else "" for name in files]
    if "" in folders:
        raise BadInput(
            f"{root} has an image outside of the class folders",
            found=files[folders.index("")],
            hint="put the images of each class into a folder of its own",
        )
    values = {"image": list(files), "label": folders}
    names = {"label": tuple(sorted(set(folders), key=lambda name: name.encode()))}
    synsets = None if location.synsets is None else Path(location.synsets)
    return ListTable(root.name, root, values, wheres=list(files), names=names, synsets=synsets)


def _is_split_file(stem: str, split: str) -> bool:
    """True for `train` and for a shard of it, `train-00000-of-00002`."""
    if stem == split:
        return True
    rest = stem.removeprefix(f"{split}-")
    return rest != stem and rest.replace("-of-", "").isdigit()


def _check_suffix(file: Path) -> None:
    if file.suffix.lower() not in TABLE_SUFFIXES:
        raise BadInput(
            f"{file} is not in a known format",
            expected=", ".join(TABLE_SUFFIXES),
            hint="scripts of data sets are never run" if file.suffix == ".py" else None,
        )


def _content(folder: Path) -> str:
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
    if not names:
        return "nothing"
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
