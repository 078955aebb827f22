"""The sparse file: coordinates and values of some tensors, for deltas and patches.

Format 1 is a safetensors file. Its sections hold all tensors one after the other in
name order: `values.<TYPE>` the values of the tensors of that type, `positions` (bytes)
the coordinates, encoded by `coordinate_codec`. The metadata hold `restitch.format`,
`restitch.kind`, the table `restitch.tensors` (a JSON list of "TYPE SHAPE KEPT CODE NAME",
from which each tensor's slice of a section follows) and the text that the writer adds.
Format 2 is format 1 with a section `factors`: the importance of the coordinates to the
model, as one factor per row and one per column of each tensor. Format 3 holds values in
8 bits (see `quantized`): `codes` instead of values, and `steps`; reading it requires the
base. Format 4 is format 1 with the bfloat16 values of some tensors in the code of
`value_codec`: they are in the section `packed`, and after the TYPE of these tensors the table
has ":" and the number of their other high bytes. All but format 3 are lossless. The bytes are
a function of the content alone. Reading checks the file: coordinates out of order or out of
range raise `Damage`.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray
from torch import Tensor

from restitch.merging.digests import digest_bytes, digest_json
from restitch.merging.errors import BadInput, Damage
from restitch.merging.files.checkpoint import FLOATING, Checkpoint
from restitch.merging.files.coordinate_codec import decode_blocks, encode, joined
from restitch.merging.files.cursor import Cursor as Cursor
from restitch.merging.files.cursor import Piece as Piece
from restitch.merging.files.header import DTYPE_NAMES, count_elements, write_header
from restitch.merging.files.mask import Mask
from restitch.merging.files.quantized import STEP_DTYPE, Quantized, step_count
from restitch.merging.files.sparse_layout import (
    CODES,
    FACTOR_DTYPE,
    FACTORS,
    FORMATS,
    PACKED,
    PACKED_DTYPE,
    POSITIONS,
    STEPS,
    KeptInfo,
    SectionSlices,
    check_sections,
    read_table,
    rows_and_columns,
    section_dtype,
    section_order,
    valid_factors,
    valid_steps,
)
from restitch.merging.files.value_codec import pack, unpack
from restitch.merging.numerics.bitwise import scatter
from restitch.merging.order import by_bytes

KINDS = ("delta", "patch")

_RESERVED = "restitch."
_COPIED = 1 << 20  # bytes at once: they stay in a core's cache from copy to write


@dataclass(frozen=True)
class SparseTensor:
    """One tensor to write: its shape, and its kept coordinates with their values.

    Attributes:
        values: one per coordinate, exact or in 8 bits.
        factors: positive bfloat16, one per row and then one per column, where a row is all that
            shares the first index. The importance of a coordinate is the product of its two.
    """

    name: str
    shape: tuple[int, ...]
    coordinates: Tensor
    values: Tensor | Quantized
    factors: Tensor | None = None


@dataclass(frozen=True)
class SparseInfo:
    """A written file: its size, its digest, and the number of coordinates that it keeps."""

    bytes: int
    digest: str
    kept: int


def write_sparse(
    path: Path,
    tensors: Iterable[SparseTensor],
    *,
    kind: str,
    metadata: Mapping[str, str],
    packed: bool = False,
) -> SparseInfo:
    """Write a sparse file atomically and durably; tensors without a coordinate are omitted.

    Args:
        path: the file to write; its folder must exist.
        tensors: sorted by name, each with sorted distinct coordinates.
        kind: `delta` or `patch`.
        metadata: more text for the metadata; keys must not begin with `restitch.`.
        packed: store exact bfloat16 values in a code where that is smaller and the tensor is not
            kept whole; they are not mapped then.
    """
    _check_labels(kind, metadata)
    table: list[str] = []
    kept = 0
    variants: set[tuple[bool, bool]] = set()  # with factors, in 8 bits
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
            code, data = encode(tensor.coordinates.numpy(), count_elements(tensor.shape))
            spool(POSITIONS, data)
            stored = _packed(tensor) if packed and code != "w" else None
            others = None if stored is None else stored[1]
            if stored is not None:
                spool(PACKED, stored[0])
            elif isinstance(tensor.values, Quantized):
                spool(CODES, _bytes_of(tensor.values.codes))
                spool(STEPS, _step_bytes(tensor.name, tensor.values, tensor.shape))
            else:
                dtype = DTYPE_NAMES[tensor.values.dtype]
                spool(f"values.{dtype}", _bytes_of(tensor.values))
            if tensor.factors is not None:
                spool(FACTORS, _factor_bytes(tensor))
            kept += count
            variants.add((tensor.factors is not None, isinstance(tensor.values, Quantized)))
            table.append(_row(tensor.values.dtype, tensor.shape, count, code, tensor.name, others))
        if len(variants) > 1:
            raise ValueError("either all tensors or none have factors, and values in 8 bits")
        spool(POSITIONS, b"")
        # Wide types first: every section then begins at a multiple of its element size.
        order = sorted(spools, key=section_order)
        weighed, quantized = next(iter(variants), (False, False))
        version = FORMATS[3 if PACKED in spools else 2 if quantized else weighed]
        sizes = {section: spools[section].tell() for section in order}
        header = _header(kind, version, table, sizes, metadata)
        size, digest = write_sections(path, header, [spools[section] for section in order])
    return SparseInfo(bytes=size, digest=digest, kept=kept)


def write_whole(
    path: Path,
    checkpoint: Checkpoint,
    names: Iterable[str],
    *,
    kind: str,
    metadata: Mapping[str, str],
) -> SparseInfo:
    """Write the sparse file that keeps every coordinate of some tensors, as `write_sparse` does.

    All sizes are known before, so that the weights are written once, straight from the checkpoint.

    Args:
        path: the file to write; its folder must exist.
        checkpoint: has the weights.
        names: of the tensors; empty ones are omitted.
        kind: `delta` or `patch`.
        metadata: as for `write_sparse`.
    """
    _check_labels(kind, metadata)
    infos = [info for info in map(checkpoint.info, sorted(names, key=by_bytes)) if info.numel]
    table = [_row(info.dtype, info.shape, info.numel, "w", info.name) for info in infos]
    sections: dict[str, list[str]] = {POSITIONS: []}
    for info in infos:
        sections.setdefault(f"values.{DTYPE_NAMES[info.dtype]}", []).append(info.name)
    order = sorted(sections, key=section_order)
    sizes = {
        section: sum(checkpoint.info(name).nbytes for name in sections[section])
        for section in order
    }
    header = _header(kind, FORMATS[0], table, sizes, metadata)
    parts = (
        _bytes_of(checkpoint.tensor(name).reshape(-1))
        for section in order
        for name in sections[section]
    )
    size, digest = _write(path, chain([header], parts))
    return SparseInfo(bytes=size, digest=digest, kept=sum(info.numel for info in infos))


def join_sparse(
    path: Path, parts: Iterable["SparseFile"], *, kind: str, metadata: Mapping[str, str]
) -> SparseInfo:
    """Write the sparse file of the tensors of several, with the bytes that `write_sparse` gives.

    Nothing is decoded, so it costs a copy of the parts.

    Args:
        path: the file to write; its folder must exist.
        parts: sparse files without a common tensor.
        kind: `delta` or `patch`.
        metadata: as for `write_sparse`.
    """
    _check_labels(kind, metadata)
    files: dict[str, SparseFile] = {}
    for part in parts:
        if common := sorted(files.keys() & set(part.names)):
            raise ValueError(f"two parts have the tensors {common}")
        files |= dict.fromkeys(part.names, part)
    files = {name: files[name] for name in sorted(files, key=by_bytes)}
    sizes, versions = {POSITIONS: 0}, {part.format for part in files.values()}
    if len(versions) > 1 and versions != {FORMATS[0], FORMATS[3]}:
        raise ValueError(f"the parts have the formats {sorted(versions)}")
    for name, part in files.items():
        for section, data in part.sections(name).items():
            sizes[section] = sizes.get(section, 0) + data.nbytes
    sizes = {section: sizes[section] for section in sorted(sizes, key=section_order)}
    table = [part.row(name) for name, part in files.items()]
    header = _header(kind, max(versions, default=FORMATS[0]), table, sizes, metadata)
    blocks = (
        _bytes_of(held[section])
        for section in sizes
        for name, part in files.items()
        if section in (held := part.sections(name))
    )
    size, digest = _write(path, chain([header], blocks))
    kept = sum(part.info(name).kept for name, part in files.items())
    return SparseInfo(bytes=size, digest=digest, kept=kept)


def _check_labels(kind: str, metadata: Mapping[str, str]) -> None:
    if kind not in KINDS or any(key.startswith(_RESERVED) for key in metadata):
        raise ValueError(f"kind {kind!r} and metadata {sorted(metadata)} cannot be written")


def _row(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    kept: int,
    code: str,
    name: str,
    others: int | None = None,
) -> str:
    """A tensor's row of the table."""
    stored = DTYPE_NAMES[dtype] if others is None else f"{DTYPE_NAMES[dtype]}:{others}"
    return f"{stored} {'x'.join(map(str, shape))} {kept} {code} {name}"


def _packed(tensor: SparseTensor) -> tuple[bytes, int] | None:
    """The values in a code, and their number of other high bytes; None if they stay as they are."""
    values = tensor.values
    if isinstance(values, Quantized) or tensor.factors is not None or values.dtype != PACKED_DTYPE:
        return None
    data, others = pack(values.contiguous().view(torch.int16).numpy().view(np.uint16))
    return (data, others) if len(data) < values.nbytes else None


def _header(
    kind: str,
    version: str,
    table: list[str],
    sizes: Mapping[str, int],
    metadata: Mapping[str, str],
) -> bytes:
    """The header of a file with sections of some bytes, in their order."""
    types = {section: section_dtype(section) for section in sizes}
    sections = [
        (section, types[section], (size // types[section].itemsize,))
        for section, size in sizes.items()
    ]
    own = {
        "restitch.format": version,
        "restitch.kind": kind,
        "restitch.tensors": json.dumps(table, separators=(",", ":"), ensure_ascii=False),
    }
    return write_header(sections, dict(sorted({**metadata, **own}.items())))


def _copied(spool: IO[bytes]) -> Iterator[bytes]:
    """What was written to a temporary file, in blocks."""
    spool.seek(0)
    while block := spool.read(_COPIED):
        yield block


def _bytes_of(flat: Tensor) -> Any:
    return flat.contiguous().view(torch.uint8).numpy().data


def _step_bytes(name: str, values: Quantized, shape: tuple[int, ...]) -> Any:
    fits = values.codes.dtype == torch.int8 and values.steps.dtype == STEP_DTYPE
    if not fits or values.steps.numel() != step_count(shape) or not valid_steps(values.steps):
        raise ValueError(f"{name!r} has steps that do not fit it")
    return _bytes_of(values.steps)


def _factor_bytes(tensor: SparseTensor) -> Any:
    factors = tensor.factors
    assert factors is not None
    fits = factors.dtype == FACTOR_DTYPE and factors.numel() == sum(rows_and_columns(tensor.shape))
    if not fits or not valid_factors(factors):
        raise ValueError(f"{tensor.name!r} has factors that do not fit it")
    return _bytes_of(factors)


def write_sections(path: Path, header: bytes, parts: Iterable[IO[bytes]]) -> tuple[int, str]:
    """Write a header and its sections atomically and durably; returns size and digest."""
    return _write(path, chain([header], chain.from_iterable(map(_copied, parts))))


def _write(path: Path, blocks: Iterable[Any]) -> tuple[int, str]:
    hasher = blake3()
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            for block in chain.from_iterable(map(_private, blocks)):
                hasher.update(block)
                file.write(block)
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
    return size, hasher.hexdigest()


def _private(data: Any) -> Iterator[memoryview]:
    """Copies of a block in parts, so that a mapped file that changes gets one digest."""
    buffer = memoryview(bytearray(min(len(data), _COPIED)))
    for start in range(0, len(data), _COPIED):
        part = buffer[: len(data) - start]
        part[:] = data[start : start + _COPIED]
        yield part


class SparseFile:
    """A mapped sparse file; make one with `open`. It is an `Edits`: it overwrites weights.

    Attributes:
        names: the tensors with kept coordinates, sorted.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        metadata: Mapping[str, str],
        infos: Mapping[str, KeptInfo],
        parts: Mapping[str, SectionSlices],
        sections: Mapping[str, Tensor],
        base: Checkpoint | None,
    ) -> None:
        self.path = path
        self.kind = kind
        self.metadata = dict(metadata)
        self.names = tuple(infos)
        self._infos = dict(infos)
        self._parts = dict(parts)
        self._sections = dict(sections)
        self._base = base
        self.total = sum(info.kept for info in infos.values())

    @classmethod
    def open(cls, path: Path, base: Checkpoint | None = None) -> "SparseFile":
        """Open a sparse file and check its table; coordinates are checked when they are read.

        Args:
            path: the file.
            base: the base of the delta, required to read values in 8 bits.
        """
        path = Path(path)
        file = Checkpoint.open(path)
        metadata = {k: v for k, v in file.metadata.items() if not k.startswith(_RESERVED)}
        version, kind = (file.metadata.get(f"restitch.{key}") for key in ("format", "kind"))
        if version not in FORMATS or kind not in KINDS:
            raise BadInput(
                f"{path} is not a sparse file of a known format",
                expected=(
                    f"restitch.format {' or '.join(FORMATS)}, restitch.kind {' or '.join(KINDS)}"
                ),
                found=f"format {version}, kind {kind}",
                hint="use the version of restitch that wrote the file, or a newer one",
            )
        try:
            quantized = version == FORMATS[2]
            infos, parts = read_table(file.metadata["restitch.tensors"], quantized=quantized)
            sections = {name: file.tensor(name) for name in file.names}
            check_sections(infos, parts, sections, version)
        except (KeyError, ValueError, RecursionError) as err:
            raise _damage(path, str(err)) from err
        return cls(path, kind, metadata, infos, parts, sections, base)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def info(self, name: str) -> KeptInfo:
        """Type, shape and number of kept coordinates of a tensor."""
        return self._infos[name]

    def coordinates(self, name: str) -> Tensor:
        """The kept coordinates of a tensor, sorted int64."""
        return torch.from_numpy(joined(self.coordinate_blocks(name), self._infos[name].kept))

    def coordinate_blocks(self, name: str) -> Iterator[NDArray[np.int64]]:
        """The kept coordinates of a tensor in order, in blocks that fit a core's cache."""
        info, part = self._infos[name], self._parts[name]
        data = self._sections[POSITIONS][part.positions].numpy().data
        try:
            yield from decode_blocks(part.code, data, info.kept, info.numel)
        except ValueError as err:
            raise _damage(self.path, f"{name}: {err}") from err

    def values(self, name: str) -> Tensor:
        """The kept values of a tensor, mapped, unpacked or restored from 8 bits; do not write."""
        info, part = self._infos[name], self._parts[name]
        if part.others is not None:
            return self._unpacked(name, part.others)
        if not self.is_quantized:
            return self._sections[f"values.{DTYPE_NAMES[info.dtype]}"][part.values]
        before = self._before(info)
        steps = self._sections[STEPS][part.steps]
        if not valid_steps(steps):
            raise _damage(self.path, f"{name}: steps that are negative or not finite")
        stored = Quantized(self._sections[CODES][part.values], steps, info.dtype)
        return stored.restored(self.coordinates(name), before, info.shape)

    def _unpacked(self, name: str, others: int) -> Tensor:
        data = self._sections[PACKED][self._parts[name].values].numpy().data
        try:
            bits = unpack(data, self._infos[name].kept, others)
        except ValueError as err:
            raise _damage(self.path, f"{name}: {err}") from err
        return torch.from_numpy(bits.view(np.int16)).view(PACKED_DTYPE)

    def _before(self, info: KeptInfo) -> Tensor:
        """The base's tensor, flat."""
        if self._base is None:
            raise ValueError(f"{self.path} was opened without its base")
        shape = self._base.info(info.name).shape if info.name in self._base else None
        if shape != info.shape:
            raise BadInput(
                f"the delta {self.path} does not fit the base {self._base.path}",
                expected=f"{info.name} of shape {list(info.shape)}",
                found="no such tensor" if shape is None else f"shape {list(shape)}",
                hint="localize the member again on this base",
            )
        return self._base.tensor(info.name).view(-1)

    @property
    def is_quantized(self) -> bool:
        """True if the file holds values in 8 bits, which are relative to the base."""
        return CODES in self._sections

    @property
    def has_factors(self) -> bool:
        """True if the file holds the importance of its coordinates."""
        return FACTORS in self._sections

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """The importance factors of a tensor's rows and columns; None if the file has none."""
        if not self.has_factors:
            return None
        factors = self._sections[FACTORS][self._parts[name].factors]
        if not valid_factors(factors):
            raise _damage(self.path, f"{name}: factors that are not positive and finite")
        rows, columns = rows_and_columns(self._infos[name].shape)
        return factors[:rows], factors[rows : rows + columns]

    def content_digest(self) -> str:
        """The digest of the mask alone."""
        return self.mask().digest()

    def tensor_digest(self, name: str) -> str:
        """The digest of all that the file holds of a tensor; equal ones edit a base equally."""
        info, part = self._infos[name], self._parts[name]
        held = [digest_bytes(_bytes_of(data)) for _, data in sorted(self.sections(name).items())]
        return digest_json([DTYPE_NAMES[info.dtype], info.shape, info.kept, part.code, held])

    def sections(self, name: str) -> dict[str, Tensor]:
        """All that the file holds of a tensor, by section; do not write to it."""
        info, part = self._infos[name], self._parts[name]
        values = PACKED if part.others is not None else f"values.{DTYPE_NAMES[info.dtype]}"
        slices = {POSITIONS: part.positions, FACTORS: part.factors, STEPS: part.steps}
        slices |= {CODES: part.values, values: part.values}
        return {
            section: self._sections[section][place]
            for section, place in slices.items()
            # Of the types of values, a file has those of its tensors.
            if section in self._sections
        }

    def row(self, name: str) -> str:
        """A tensor's row of the table."""
        info = self._infos[name]
        part = self._parts[name]
        return _row(info.dtype, info.shape, info.kept, part.code, name, part.others)

    @property
    def format(self) -> str:
        """The version of its format."""
        return FORMATS[
            3 if PACKED in self._sections else 2 if self.is_quantized else self.has_factors
        ]

    def tensors(self) -> Iterator[SparseTensor]:
        """The exact values of all tensors, to write them again, one tensor at a time."""
        for name in self.names:
            shape = self._infos[name].shape
            yield SparseTensor(name, shape, self.coordinates(name), self.values(name))

    def mask(self) -> Mask:
        """The kept coordinates as a mask, read on demand."""
        return Mask({name: info.kept for name, info in self._infos.items()}, self.coordinates)

    def apply(self, name: str, flat: Tensor) -> None:
        """Overwrite the kept coordinates of a flat tensor with the values."""
        info = self._infos[name]
        if flat.shape != (info.numel,):
            raise ValueError(f"{name!r} has {info.numel} elements, not {tuple(flat.shape)}")
        self.editor(name)(flat)

    def editor(self, name: str) -> Callable[[Tensor], None]:
        """A function that overwrites the parts of a tensor in order."""
        cursor = self.cursor(name)

        def edit(part: Tensor) -> None:
            for coordinates, values in cursor.advance(part.numel()):
                scatter(part, coordinates, values)

        return edit

    def cursor(self, name: str) -> "Cursor":
        """A reader of the kept coordinates and values of a tensor, range by range."""
        return Cursor(self.coordinate_blocks(name), self.values(name))


def damage(path: Path, expected: str, found: str) -> Damage:
    """The error for a file that does not match its format."""
    hint = "restore the file from a backup, or create it again"
    return Damage(f"{path} is damaged", expected=expected, found=found, hint=hint)


def _damage(path: Path, found: str) -> Damage:
    return damage(path, "a valid sparse file", found)
