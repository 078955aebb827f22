"""Parquet and arrow files as tables, read one row group at a time.

Class names come from the schema, where `datasets` writes them. Images stay encoded.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from restitch.merging.errors import BadInput
from restitch.merging.files.safe_open import open_regular
from restitch.modeling.data.text_files import check_pointer


class ArrowTable:
    """Parquet or arrow files of the same columns, one after the other."""

    def __init__(self, root: Path, paths: Sequence[Path]) -> None:
        files = [_open(path) for path in paths]
        self.root = root
        self.synsets: Path | None = None
        self.typed = True
        self.notes: tuple[str, ...] = ()
        self.name = ", ".join(f.name for f in files)
        self.columns = tuple(files[0].schema.names)
        self._names = _class_names(files[0].schema)
        self._groups: list[tuple[_Groups, int]] = []
        self._starts: list[int] = []
        self._wheres: list[tuple[str, int]] = []
        total = 0
        for file in files:
            self._check_schema(file, files[0])
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
        where = self.where(index)
        return tuple(_values(where, table[column][offset : offset + 1])[0] for column in columns)

    def column(self, name: str) -> Sequence[Any]:
        """All values of one column."""
        values: list[Any] = []
        for file, group in self._groups:
            values.extend(_values(file.name, file.read(group, (name,))[name]))
        return values

    def named_files(self, column: str) -> Iterator[str]:
        """The names of files in a column; bytes of images that lie in the table are not read."""
        for file, group in self._groups:
            if file.holds_bytes(group, column):
                continue
            for value in _values(file.name, file.read(group, (column,))[column]):
                name = value
                if isinstance(value, dict):
                    name = None if value.get("bytes") is not None else value.get("path")
                if isinstance(name, str):
                    yield name

    def where(self, index: int) -> str:
        """File and row."""
        group = bisect_right(self._starts, index) - 1
        file, first = self._wheres[group]
        return f"{file} row {first + index - self._starts[group]}"

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """The names of the classes, if the schema has them."""
        return self._names.get(column)

    def _check_schema(self, file: "_Groups", first: "_Groups") -> None:
        """Refuse files whose columns, or whose classes, differ from those of the first file."""
        names = file.schema.names
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise BadInput(
                f"{file.name} has several columns of one name", found=", ".join(map(repr, twice))
            )
        if set(names) != set(self.columns):
            raise BadInput(
                f"{file.name} and {first.name} have different columns",
                expected=", ".join(self.columns),
                found=", ".join(names),
            )
        classes = _class_names(file.schema)
        for column in self.columns:
            if classes.get(column) != self._names.get(column):
                raise BadInput(
                    f"{file.name} and {first.name} have different classes in column {column!r}",
                    expected=listed_names(self._names.get(column)),
                    found=listed_names(classes.get(column)),
                    hint="write both files with the same features",
                )

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

    def holds_bytes(self, group: int, column: str) -> bool:
        """True if it is known without reading that all images of a column lie in the table."""


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
        except (pa.ArrowException, OSError, ValueError) as error:
            raise BadInput(f"{self.name} cannot be read", found=error) from error

    def holds_bytes(self, group: int, column: str) -> bool:
        """True if the statistics say so."""
        chunks = self._file.metadata.row_group(group)
        for place in range(chunks.num_columns):
            chunk = chunks.column(place)
            if chunk.path_in_schema in (column, f"{column}.bytes"):
                statistics = chunk.statistics
                is_bytes = chunk.physical_type == "BYTE_ARRAY" and not _is_text(self.schema, column)
                return bool(
                    is_bytes
                    and statistics is not None
                    and statistics.has_null_count
                    and statistics.null_count == 0
                )
        return False


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

    def holds_bytes(self, group: int, column: str) -> bool:
        """True if no value lacks its bytes."""
        assert group == 0
        kind = self.schema.field(column).type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return all(part.field("bytes").null_count == 0 for part in self._table[column].chunks)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _open(path: Path) -> _Groups:
    try:
        with open_regular(path) as file:
            check_pointer(str(path), file.read(64))
        return _Parquet(path) if path.suffix.lower() == ".parquet" else _Arrow(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BadInput(
            f"{path} cannot be read", found=error, hint="fetch or write the file again"
        ) from error


def _values(where: str, column: pa.ChunkedArray) -> list[Any]:
    """Python values; a text that is not UTF-8 is refused."""
    try:
        values: list[Any] = column.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise BadInput(f"{where} has a value that cannot be read", found=error) from error
    return values


def _is_text(schema: pa.Schema, column: str) -> bool:
    kind = schema.field(column).type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def listed_names(names: Sequence[str] | None) -> str:
    """The names of classes in an error."""
    return "no names" if names is None else ", ".join(map(repr, names[:8]))


def _class_names(schema: pa.Schema) -> dict[str, tuple[str, ...]]:
    try:
        described = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: tuple(map(str, feature["names"]))
            for column, feature in described.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
