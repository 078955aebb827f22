"""Parquet and arrow files as tables, read one row group at a time.

Class names come from the schema, where `datasets` writes them. Images stay encoded.
"""

import json
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from restitch.merging.errors import BadInput
from restitch.merging.files.safe_open import open_regular


class ArrowTable:
    """Files of one schema, one after the other."""

    def __init__(self, root: Path, files: Sequence["_Groups"]) -> None:
        self.root = root
        self.synsets: Path | None = None
        self.name = ", ".join(f.name for f in files)
        self.columns = tuple(files[0].schema.names)
        self._names = _class_names(files[0].schema)
        self._groups: list[tuple[_Groups, int]] = []
        self._starts: list[int] = []
        self._wheres: list[tuple[str, int]] = []
        total = 0
        for file in files:
            if tuple(file.schema.names) != self.columns:
                raise BadInput(
                    f"{file.name} and {files[0].name} have different columns",
                    expected=", ".join(self.columns),
                    found=", ".join(file.schema.names),
                )
            row = 0
            for group, size in enumerate(file.sizes):
                self._groups.append((file, group))
                self._starts.append(total)
                self._wheres.append((file.name, row))
                total += size
                row += size
        self._total = total
        self._cached: tuple[int, tuple[str, ...], pa.Table] | None = None
        self._lock = Lock()  # rows are prepared by several threads

    def __len__(self) -> int:
        return self._total

    def row(self, index: int, columns: Sequence[str]) -> tuple[Any, ...]:
        """The values of one row; reading in order reads each row group once."""
        group = bisect_right(self._starts, index) - 1
        table = self._group(group, tuple(columns))
        offset = index - self._starts[group]
        return tuple(table[column][offset].as_py() for column in columns)

    def column(self, name: str) -> Sequence[Any]:
        """All values of one column."""
        values: list[Any] = []
        for file, group in self._groups:
            values.extend(file.read(group, (name,))[name].to_pylist())
        return values

    def where(self, index: int) -> str:
        """File and row."""
        group = bisect_right(self._starts, index) - 1
        file, first = self._wheres[group]
        return f"{file} row {first + index - self._starts[group]}"

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """The names of the classes, if the schema has them."""
        return self._names.get(column)

    def _group(self, index: int, columns: tuple[str, ...]) -> pa.Table:
        with self._lock:
            if self._cached is None or self._cached[:2] != (index, columns):
                file, group = self._groups[index]
                self._cached = (index, columns, file.read(group, columns))
            return self._cached[2]


class _Groups(Protocol):
    """One file in parts that fit into memory."""

    name: str
    schema: pa.Schema
    sizes: list[int]

    def read(self, group: int, columns: tuple[str, ...]) -> pa.Table:
        """Some columns of one part."""


class _Parquet(_Groups):
    def __init__(self, path: Path) -> None:
        with open_regular(path) as file:
            self._file = pq.ParquetFile(f"/dev/fd/{file.fileno()}", memory_map=True)
        self._lock = Lock()  # two threads in one ParquetFile crash the process
        self.name = path.name
        self.schema = self._file.schema_arrow
        metadata = self._file.metadata
        self.sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]

    def read(self, group: int, columns: tuple[str, ...]) -> pa.Table:
        try:
            with self._lock:
                return self._file.read_row_group(group, columns=list(columns))
        except (pa.ArrowException, OSError) as error:
            raise BadInput(f"{self.name} cannot be read", found=error) from error


class _Arrow(_Groups):
    """An arrow file or stream, memory-mapped: unused batches cost nothing."""

    def __init__(self, path: Path) -> None:
        with open_regular(path) as file:
            source = pa.memory_map(f"/dev/fd/{file.fileno()}")
        try:
            self._table = pa.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid:
            self._table = pa.ipc.open_file(source).read_all()
        self.name = path.name
        self.schema = self._table.schema
        self.sizes = [self._table.num_rows]

    def read(self, group: int, columns: tuple[str, ...]) -> pa.Table:
        assert group == 0
        return self._table.select(list(columns))


def open_arrow_files(root: Path, files: Sequence[Path]) -> ArrowTable:
    """Parquet or arrow files as one table."""
    return ArrowTable(root, [_open(file) for file in files])


def open_arrow_folder(root: Path) -> ArrowTable:
    """Open one split that `datasets` saved to disk."""
    state = root / "state.json"
    try:
        with open_regular(state) as file:
            content = json.loads(file.read().decode("utf-8"))
        names = [entry["filename"] for entry in content["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(f"{state} cannot be read", found=error) from error
    if content.get("_indices_data_files") or not names:
        raise BadInput(
            f"{root} is a data set with an index over its rows, or without rows",
            hint="save it again after flatten_indices()",
        )
    if any(Path(name).name != name for name in names):
        raise BadInput(f"{state} names files outside of its folder")
    return open_arrow_files(root, [root / name for name in names])


def _open(path: Path) -> _Groups:
    try:
        return _Parquet(path) if path.suffix.lower() == ".parquet" else _Arrow(path)
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{path} cannot be read", found=error) from error


def _class_names(schema: pa.Schema) -> dict[str, tuple[str, ...]]:
    try:
        described = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: tuple(feature["names"])
            for column, feature in described.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
