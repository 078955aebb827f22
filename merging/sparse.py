"""The sparse file: coordinates and values of some tensors, for deltas and patches.

Format 1 is a safetensors file. Its sections hold all tensors one after the other in
name order: `values.<TYPE>` the values of the tensors of that type, `positions` (bytes)
the coordinates as `merging.positions` encodes them. The metadata hold
`restitch.format`, `restitch.kind`, the table `restitch.tensors` (a JSON list of
"TYPE SHAPE KEPT CODE NAME", all that is needed to find each tensor's part of a section)
and what the writer adds. Format 2 is format 1 with a section `factors`: what the
coordinates are worth to the model, as one factor per row and one per column of each
tensor; a file without them is written as format 1. Lossless; the bytes are a function of
the content alone. What is read is checked: coordinates out of order or range are `Damage`.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merging.checkpoint import FLOATING, Checkpoint, by_bytes
from merging.errors import BadInput, Damage
from merging.header import DTYPE_NAMES, DTYPES, count_elements, write_header
from merging.mask import Mask
from merging.overwrite import put
from merging.pieces import Cursor as Cursor
from merging.pieces import Piece as Piece
from merging.positions import decode_blocks, encode, encoded_size

FORMATS = ("1", "2")
KINDS = ("delta", "patch")

_RESERVED = "restitch."
_POSITIONS = "positions"
_FACTORS = "factors"
_FACTOR_DTYPE = torch.bfloat16  # weights of a mean: nobody needs their ninth bit
_RESTORE = "restore the file from a copy, or make it again"


@dataclass(frozen=True)
class SparseTensor:
    """One tensor to write: its shape, and the coordinates kept with their values.

    Attributes:
        factors: bfloat16, positive: one per row and then one per column, where a row is all that
            shares the first index; what a coordinate is worth is the product of its two.
    """

    name: str
    shape: tuple[int, ...]
    coordinates: Tensor
    values: Tensor
    factors: Tensor | None = None


@dataclass(frozen=True)
class SparseInfo:
    """What was written: the size of the file and how many coordinates it keeps."""

    bytes: int
    kept: int


@dataclass(frozen=True)
class KeptInfo:
    """A tensor of a sparse file: type and shape of the whole, and how many are kept."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    kept: int

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return count_elements(self.shape)


@dataclass(frozen=True)
class _Part:
    """Where a tensor's coordinates, values and factors lie in their sections."""

    code: str
    positions: slice
    values: slice
    factors: slice


def rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    """How many factors of each kind a tensor has; all that shares the first index is one row."""
    rows = shape[0] if shape else 1
    return rows, count_elements(shape[1:])


def write_sparse(
    path: Path, tensors: Iterable[SparseTensor], *, kind: str, metadata: Mapping[str, str]
) -> SparseInfo:
    """Write a sparse file, atomically and durably; tensors without a coordinate are left out.

    Args:
        path: the file to write; its folder must exist.
        tensors: sorted by name, each with sorted distinct coordinates.
        kind: `delta` or `patch`.
        metadata: text to keep with it; keys must not begin with `restitch.`.
    """
    if kind not in KINDS or any(key.startswith(_RESERVED) for key in metadata):
        raise ValueError(f"kind {kind!r} and metadata {sorted(metadata)} cannot be written")
    table: list[str] = []
    kept: dict[str, int] = {}
    weighed: list[bool] = []
    last = b""
    with ExitStack() as stack:
        spools: dict[str, IO[bytes]] = {}

        def spool(section: str, data: Any) -> None:
            if section not in spools:
                spools[section] = stack.enter_context(tempfile.TemporaryFile(dir=path.parent))
            spools[section].write(data)

        for tensor in tensors:
            name, count = by_bytes(tensor.name), tensor.coordinates.numel()
            if table and name <= last:
                raise ValueError(f"{tensor.name!r} is not in name order")
            if count != tensor.values.numel() or tensor.values.dtype not in FLOATING:
                raise ValueError(f"{tensor.name!r} has values that do not fit its coordinates")
            if not count:
                continue
            last = name
            dtype = DTYPE_NAMES[tensor.values.dtype]
            code, data = encode(tensor.coordinates.numpy(), count_elements(tensor.shape))
            spool(_POSITIONS, data)
            spool(dtype, tensor.values.contiguous().view(torch.uint8).numpy().data)
            kept[dtype] = kept.get(dtype, 0) + count
            weighed.append(tensor.factors is not None)
            if tensor.factors is not None:
                spool(_FACTORS, _factor_bytes(tensor))
            shape = "x".join(map(str, tensor.shape))
            table.append(f"{dtype} {shape} {count} {code} {tensor.name}")
        if any(weighed) and not all(weighed):
            raise ValueError("some tensors have factors and others have none")
        # Wide types first: every section then begins at a multiple of its element size.
        dtypes = sorted(kept, key=lambda name: (-DTYPES[name].itemsize, name))
        sections = [(f"values.{name}", DTYPES[name], (kept[name],)) for name in dtypes]
        order = [*dtypes, _POSITIONS]
        if any(weighed):
            place = sum(DTYPES[name].itemsize >= _FACTOR_DTYPE.itemsize for name in dtypes)
            count = spools[_FACTORS].tell() // _FACTOR_DTYPE.itemsize
            sections.insert(place, (_FACTORS, _FACTOR_DTYPE, (count,)))
            order.insert(place, _FACTORS)
        positions = spools[_POSITIONS].tell() if table else 0
        sections.append((_POSITIONS, torch.uint8, (positions,)))
        own = {
            "restitch.format": FORMATS[any(weighed)],
            "restitch.kind": kind,
            "restitch.tensors": json.dumps(table, separators=(",", ":"), ensure_ascii=False),
        }
        header = write_header(sections, dict(sorted({**metadata, **own}.items())))
        parts = [spools[section] for section in order if section in spools]
        size = _assemble(path, header, parts)
    return SparseInfo(bytes=size, kept=sum(kept.values()))


def _factor_bytes(tensor: SparseTensor) -> Any:
    factors = tensor.factors
    assert factors is not None
    fits = factors.dtype == _FACTOR_DTYPE and factors.numel() == sum(rows_and_columns(tensor.shape))
    if not fits or not _are_weights(factors):
        raise ValueError(f"{tensor.name!r} has factors that do not fit it")
    return factors.contiguous().view(torch.uint8).numpy().data


def _are_weights(factors: Tensor) -> bool:
    return bool((factors > 0).all()) and bool(torch.isfinite(factors).all())


def _assemble(path: Path, header: bytes, parts: Iterable[IO[bytes]]) -> int:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(header)
            for part in parts:
                part.seek(0)
                shutil.copyfileobj(part, file, 1 << 22)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return size


class SparseFile:
    """A sparse file, mapped; make one with `open`. It is an `Edits`: it overwrites."""

    def __init__(
        self,
        path: Path,
        kind: str,
        metadata: Mapping[str, str],
        infos: Mapping[str, KeptInfo],
        parts: Mapping[str, _Part],
        sections: Mapping[str, Tensor],
    ) -> None:
        self.path = path
        self.kind = kind
        self.metadata = dict(metadata)
        self._infos = dict(infos)
        self._parts = dict(parts)
        self._sections = dict(sections)
        self._names = tuple(infos)
        self.total = sum(info.kept for info in infos.values())

    @classmethod
    def open(cls, path: Path) -> "SparseFile":
        """Open a sparse file; its table is checked, its coordinates when they are read."""
        path = Path(path)
        file = Checkpoint.open(path)
        metadata = {k: v for k, v in file.metadata.items() if not k.startswith(_RESERVED)}
        version, kind = (file.metadata.get(f"restitch.{key}") for key in ("format", "kind"))
        if version not in FORMATS or kind not in KINDS:
            raise BadInput(
                f"{path} is no sparse file that can be read",
                expected=(
                    f"restitch.format {' or '.join(FORMATS)}, restitch.kind {' or '.join(KINDS)}"
                ),
                found=f"format {version}, kind {kind}",
                hint="use the file as restitch wrote it, and a restitch as new as its writer",
            )
        try:
            infos, parts = _read_table(file.metadata["restitch.tensors"])
            sections = {name: file.tensor(name) for name in file.names}
            _check_sections(infos, parts, sections, with_factors=version == FORMATS[1])
        except (KeyError, ValueError, RecursionError) as err:
            raise _damage(path, str(err)) from err
        return cls(path, kind, metadata, infos, parts, sections)

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors with kept coordinates, sorted."""
        return self._names

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def info(self, name: str) -> KeptInfo:
        """Type, shape and number of kept coordinates of a tensor."""
        return self._infos[name]

    def coordinates(self, name: str) -> Tensor:
        """The kept coordinates of a tensor, sorted int64."""
        found = torch.empty(self._infos[name].kept, dtype=torch.int64)
        array, done = found.numpy(), 0
        for block in self.coordinate_blocks(name):
            array[done : done + len(block)] = block
            done += len(block)
        return found

    def coordinate_blocks(self, name: str) -> Iterator[NDArray[np.int64]]:
        """The kept coordinates of a tensor in order, in blocks that fit a cache."""
        info, part = self._infos[name], self._parts[name]
        data = self._sections[_POSITIONS][part.positions].numpy().data
        try:
            yield from decode_blocks(part.code, data, info.kept, info.numel)
        except ValueError as err:
            raise _damage(self.path, f"{name}: {err}") from err

    def values(self, name: str) -> Tensor:
        """The kept values of a tensor, mapped; do not write to them."""
        return self._sections[f"values.{DTYPE_NAMES[self._infos[name].dtype]}"][
            self._parts[name].values
        ]

    @property
    def has_factors(self) -> bool:
        """Whether it says what its coordinates are worth to the model."""
        return _FACTORS in self._sections

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """What the rows and what the columns of a tensor are worth; None where it is not known."""
        if not self.has_factors:
            return None
        found = self._sections[_FACTORS][self._parts[name].factors]
        if not _are_weights(found):
            raise _damage(self.path, f"{name}: factors that are no positive numbers")
        rows, columns = rows_and_columns(self._infos[name].shape)
        return found[:rows], found[rows : rows + columns]

    def mask(self) -> Mask:
        """The kept coordinates as a mask; read when they are asked for."""
        return Mask({name: info.kept for name, info in self._infos.items()}, self.coordinates)

    def apply(self, name: str, flat: Tensor) -> None:
        """Overwrite the kept coordinates of a flat tensor by the values."""
        info = self._infos[name]
        if flat.shape != (info.numel,):
            raise ValueError(f"{name!r} has {info.numel} elements, not {tuple(flat.shape)}")
        self.editor(name)(flat)

    def editor(self, name: str) -> Callable[[Tensor], None]:
        """A function that overwrites the parts of a tensor, given one after the other."""
        cursor = self.cursor(name)

        def edit(part: Tensor) -> None:
            for coordinates, values in cursor.take(part.numel()):
                put(part, coordinates, values)

        return edit

    def cursor(self, name: str) -> "Cursor":
        """The kept coordinates and values of a tensor, to be taken range by range."""
        return Cursor(self.coordinate_blocks(name), self.values(name))


def _damage(path: Path, found: str) -> Damage:
    return Damage(f"{path} is damaged", expected="a whole sparse file", found=found, hint=_RESTORE)


def _read_table(text: str) -> tuple[dict[str, KeptInfo], dict[str, _Part]]:
    infos: dict[str, KeptInfo] = {}
    parts: dict[str, _Part] = {}
    position = factor = 0
    value: dict[str, int] = {}
    last = b""
    rows = json.loads(text)
    if not isinstance(rows, list):
        raise ValueError("the table of tensors is no list")  # noqa: TRY004
    for row in rows:
        dtype, extents, count, code, name = str(row).split(" ", 4)
        if infos and by_bytes(name) <= last:
            raise ValueError(f"{name!r} is not in name order")
        last = by_bytes(name)
        shape = tuple(_natural(extent) for extent in extents.split("x")) if extents else ()
        kept = _natural(count)
        if count_elements(shape) >= 1 << 63:
            raise ValueError(f"{name!r} is larger than any tensor")
        size = encoded_size(code, kept, count_elements(shape))
        begin = value.get(dtype, 0)
        infos[name] = KeptInfo(name, DTYPES[dtype], shape, kept)
        factors = sum(rows_and_columns(shape))
        parts[name] = _Part(
            code,
            slice(position, position + size),
            slice(begin, begin + kept),
            slice(factor, factor + factors),
        )
        position += size
        factor += factors
        value[dtype] = begin + kept
    return infos, parts


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ValueError(f"{text!r} is no size")
    return int(text)


def _check_sections(
    infos: Mapping[str, KeptInfo],
    parts: Mapping[str, _Part],
    sections: Mapping[str, Tensor],
    *,
    with_factors: bool,
) -> None:
    need: dict[str, tuple[torch.dtype, int]] = {_POSITIONS: (torch.uint8, 0)}
    for name, info in infos.items():
        if info.dtype not in FLOATING:
            raise ValueError(f"{name!r} holds no weights")
        need[_POSITIONS] = (torch.uint8, parts[name].positions.stop)
        need[f"values.{DTYPE_NAMES[info.dtype]}"] = (info.dtype, parts[name].values.stop)
        if with_factors:
            need[_FACTORS] = (_FACTOR_DTYPE, parts[name].factors.stop)
    found = {name: (section.dtype, section.numel()) for name, section in sections.items()}
    if found != need:
        raise ValueError(f"sections {found} where the table needs {need}")
