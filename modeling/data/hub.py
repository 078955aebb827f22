"""Data sets on the hub, by id and commit, through `datasets`.

The commit is pinned before anything is read, so a key with the commit identifies the bytes. Code
of a data set is never run. `HF_ENDPOINT` and the cache variables of the environment apply.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from restitch.merging.errors import BadInput, RestitchError, Unavailable
from restitch.merging.files.safe_open import open_regular
from restitch.modeling.data.file_kinds import table_kind
from restitch.modeling.data.location import Location

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


# Builders whose files are read themselves: what `datasets` prepared from them is not enough.
_READS_FILES = ("csv", "json", "imagefolder")
# Settings of a data set that do not say how its files are read.
_EACH_HAS = ("name", "version", "data_dir", "data_files", "description", "features")


@dataclass(frozen=True)
class HubFiles:
    """A split in text files.

    Attributes:
        location: the files, in the cache.
        delimiter: of CSV files.
        classes: the names of the classes by column.
    """

    location: Location
    delimiter: str | None
    classes: Mapping[str, tuple[str, ...]]


class HubTable:
    """One split of a data set on the hub, memory-mapped by `datasets`; images stay encoded."""

    def __init__(self, name: str, dataset: Any, root: Path) -> None:
        from datasets import ClassLabel, Image

        self._names: dict[str, tuple[str, ...]] = {}
        self._images: set[str] = set()
        for column, feature in dataset.features.items():
            if isinstance(feature, Image):
                dataset = dataset.cast_column(column, Image(decode=False))
                self._images.add(column)
            elif isinstance(feature, ClassLabel):
                self._names[column] = tuple(feature.names)
        self._dataset = dataset
        self._views: dict[tuple[str, ...], Any] = {}  # other columns are never decoded
        self.name = name
        self.root = root
        self.columns = tuple(dataset.column_names)
        self.synsets: Path | None = None
        self.typed = True
        self.notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self._dataset)

    def row(self, index: int, columns: Sequence[str]) -> tuple[Any, ...]:
        """The values of one row."""
        key = tuple(columns)
        if key not in self._views:
            self._views[key] = self._dataset.select_columns(list(key))
        values = self._views[key][index]
        return tuple(
            _with_bytes(values[column]) if column in self._images else values[column]
            for column in columns
        )

    def column(self, name: str) -> Sequence[Any]:
        """All values of one column."""
        values: Sequence[Any] = self._dataset.select_columns([name])[:][name]
        return values

    def named_files(self, column: str) -> Iterator[str]:
        """None: the commit stands for all files."""
        yield from ()

    def where(self, index: int) -> str:
        """Data set and row."""
        return f"{self.name} row {index}"

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """The names of the classes, if the data set has them."""
        return self._names.get(column)


def _with_bytes(image: Any) -> Any:
    """An image with its bytes: `datasets` leaves those of image folders in files of its caches."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    if not isinstance(image, dict) or image.get("bytes") is not None or not image.get("path"):
        return image
    place = Path(image["path"]).resolve()
    caches = (Path(HF_HUB_CACHE), Path(datasets.config.HF_DATASETS_CACHE))
    if not any(place.is_relative_to(cache.resolve()) for cache in caches):
        return image  # refused where it is read
    with open_regular(place) as file:
        return {**image, "bytes": file.read()}


def _snapshot(location: Location) -> Path:
    """The folder of the cache with the files of a commit."""
    from huggingface_hub.constants import HF_HUB_CACHE

    owner = location.root.replace("/", "--")
    return Path(HF_HUB_CACHE, f"datasets--{owner}", "snapshots", str(location.revision))


def locate_on_hub(path: str, source: str, *, revision: str | None) -> Location:
    """Locate a split of a data set on the hub, without network access.

    Args:
        path: `owner/name` or `owner/name:configuration`.
        source: the split, or `configuration/split`.
        revision: the commit.
    """
    path, _, config = path.partition(":")
    if not _ID.fullmatch(path):
        raise BadInput(
            f"{path} is neither a folder nor the id of a data set on the hub",
            hint="set path: to a folder, or to owner/name",
        )
    if revision is None or not _COMMIT.fullmatch(revision):
        raise BadInput(
            f"there is no folder {path}, and as a hub id it has no commit",
            expected="a folder, or owner/name@commit",
            found=revision,
            hint="check path:; registration pins hub ids to a commit",
        )
    other, _, split = source.rpartition("/")
    return Location("hub", path, split=split, config=other or config or None, revision=revision)


def open_hub(location: Location) -> HubTable | HubFiles:
    """The rows of a split on the hub, downloaded once into the cache of `datasets`.

    Returns:
        The table, or the files of a split in text files, which are read like those of a folder:
        `datasets` joins the rows between two quotes of TSV, and takes some texts for no text.

    Raises:
        BadInput: no such data set, configuration or split; lists the known ones.
        Unavailable: the hub cannot be reached and the cache does not have the data set.
    """
    import datasets

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        dataset = datasets.load_dataset(
            location.root, location.config, split=location.split, revision=location.revision
        )
    except Exception as error:
        raise _explained(location.root, error) from error
    # Without a network `datasets` takes the newest commit in its cache, not the requested one;
    # the folder of the prepared files is named by the commit that they came from.
    cached = {Path(file["filename"]).parent.name for file in dataset.cache_files}
    if cached != {location.revision}:
        raise Unavailable(
            f"{location.root} cannot be fetched from the hub",
            expected=f"commit {location.revision}",
            found=f"in the cache: {', '.join(sorted(cached)) or 'nothing'}",
            hint="try again when the hub can be reached",
        )
    if dataset.info.builder_name in _READS_FILES and not _has_rows(_snapshot(location)):
        _fetch_again(location)
    files = _text_files(location, dataset)
    name = f"{location.root} {location.split}"
    return files or HubTable(name, dataset, _snapshot(location))


def _has_rows(folder: Path) -> bool:
    """Whether files lie there that do not only describe the data set.

    `datasets` always fetches those that do, and no others where it has prepared the rows before.
    """
    import datasets

    names = datasets.config
    only_describe = {
        names.REPOCARD_FILENAME,
        names.REPOYAML_FILENAME,
        names.DATASETDICT_INFOS_FILENAME,
    }
    return any(path.is_file() and path.name not in only_describe for path in folder.rglob("*"))


def _fetch_again(location: Location) -> None:
    """Fetch the files of a commit: the cache of the hub was deleted, and not that of `datasets`."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(location.root, repo_type="dataset", revision=location.revision)
    except Exception as error:
        raise _explained(location.root, error) from error


def _text_files(location: Location, dataset: Any) -> HubFiles | None:
    """The files of a split, if they are text tables that the data set reads without settings."""
    import datasets

    if dataset.info.builder_name not in ("csv", "json"):
        return None
    folder = _snapshot(location)
    try:
        builder = datasets.load_dataset_builder(str(folder), location.config)
    except Exception as error:
        raise _explained(location.root, error) from error
    config, default = builder.config, type(builder.config)()
    delimiter = getattr(config, "sep", None)
    others = (f.name for f in fields(default) if f.name not in (*_EACH_HAS, "sep", "delimiter"))
    if any(getattr(config, name) != getattr(default, name) for name in others):
        return None  # the data set says how it is read
    files = [str(file) for file in (config.data_files or {}).get(location.split, ())]
    if not files:
        raise BadInput(
            f"{location.root} has text files, and {location.split!r} is not one of its splits",
            expected=", ".join(map(str, config.data_files or {})),
            hint="name a whole split; sample: takes a part of it",
        )
    names = tuple(Path(file).relative_to(folder).as_posix() for file in files)
    if None in map(table_kind, names):
        return None
    classes = {
        column: tuple(feature.names)
        for column, feature in dataset.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    return HubFiles(Location("table", str(folder), names), delimiter, classes)


def _explained(path: str, error: Exception) -> RestitchError:
    """Explain an error of the hub's libraries to the user."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    absent = (RepositoryNotFoundError, RevisionNotFoundError, DatasetNotFoundError)
    if isinstance(error, GatedRepoError):
        return BadInput(
            f"the data set {path} is gated on the hub",
            found=error,
            hint="request access on its page, then set HF_TOKEN",
        )
    if isinstance(error, absent):
        return BadInput(f"there is no data set {path} on the hub", found=error)
    if isinstance(error, LocalEntryNotFoundError | ConnectionError | TimeoutError):
        return Unavailable(f"{path} cannot be fetched from the hub", found=error)
    if isinstance(error, ValueError | RuntimeError | KeyError):
        # An unknown configuration or split, or a data set that is a script: the error says which.
        return BadInput(
            f"the data set {path} cannot be used",
            found=error,
            hint="name a split as split or config/split",
        )
    return Unavailable(
        f"{path} cannot be fetched from the hub", found=f"{type(error).__name__}: {error}"
    )
