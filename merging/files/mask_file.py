"""The mask file: one bit for each weight of a shared patch, set if a specialist takes it.

A safetensors file with one section of bytes, `masks`, which holds the tensors in name order, and
the table `restitch.masks` in the metadata: a JSON list of "WEIGHTS TAKEN CODE BYTES NAME". Bit i
of a tensor stands for the i-th weight that the patch keeps of it. Each tensor has the smallest of
the encodings of `coordinate_codec` and of `z`: the bitmap, compressed with the Huffman code of
deflate. The bytes of `z` may depend on the release of zlib, their meaning does not. A tensor
without a set bit is omitted. Reading checks the table against the patch before it allocates
anything, and raises `Damage` if they do not match.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
from numpy.typing import NDArray

from restitch.merging.errors import BadInput, Damage
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.coordinate_codec import decode_blocks, encode, encoded_size
from restitch.merging.files.header import write_header
from restitch.merging.files.sparse import SparseFile, damage, write_sections
from restitch.merging.files.sparse_layout import parse_size, table_rows
from restitch.merging.order import by_bytes

FORMAT = "1"

Bits = NDArray[np.bool_]

_SECTION = "masks"
_OWN = ("restitch.format", "restitch.kind", "restitch.masks")


class MaskWriter:
    """Collects the bits of one specialist, tensor by tensor; a context that removes its spool.

    Args:
        folder: the folder of the temporary file.
    """

    def __init__(self, folder: Path) -> None:
        self._spool = TemporaryFile(dir=folder)  # noqa: SIM115  closed by the context
        self._table: list[str] = []
        self._last = b""

    def __enter__(self) -> "MaskWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._spool.close()

    def add(self, name: str, bits: Bits) -> None:
        """Add the bits of the next tensor in name order."""
        taken = int(np.count_nonzero(bits))
        if self._table and by_bytes(name) <= self._last:
            raise ValueError(f"{name!r} is not in name order")
        if not taken:
            return
        code, data = _encoded(bits, taken)
        self._spool.write(data)
        self._table.append(f"{len(bits)} {taken} {code} {len(data)} {name}")
        self._last = by_bytes(name)

    def finish(self, path: Path, metadata: Mapping[str, str]) -> int:
        """Write the file atomically and durably, and return its size.

        Args:
            path: the file; its folder must exist.
            metadata: more text for the metadata, without the keys of the format.
        """
        clash = sorted(set(metadata) & set(_OWN))
        if clash:
            raise ValueError(f"metadata {clash} cannot be written")
        table = json.dumps(self._table, separators=(",", ":"), ensure_ascii=False)
        own = dict(zip(_OWN, (FORMAT, "mask", table), strict=True))
        entries = [(_SECTION, torch.uint8, (self._spool.tell(),))]
        header = write_header(entries, dict(sorted({**metadata, **own}.items())))
        return write_sections(path, header, [self._spool])[0]


def _encoded(bits: Bits, taken: int) -> tuple[str, bytes]:
    code, data = encode(np.flatnonzero(bits), len(bits))
    # The bits of a mask have no repeated patterns; only their share of ones can be exploited.
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    bitmap = np.packbits(bits, bitorder="little").tobytes()
    packed = deflate.compress(bitmap) + deflate.flush()
    return ("z", packed) if len(packed) < len(data) else (code, data)


@dataclass(frozen=True)
class _Row:
    """A tensor's bits: their number, the number of set ones, and their slice of the section."""

    count: int
    taken: int
    code: str
    place: slice


class MaskFile:
    """A mask file, mapped, with the patch that it selects from; make one with `open`.

    Attributes:
        names: the tensors with a set bit, sorted.
        metadata: the text that the writer added.
    """

    def __init__(
        self, path: Path, metadata: Mapping[str, str], rows: Mapping[str, _Row], section: memoryview
    ) -> None:
        self.path = path
        self.metadata = dict(metadata)
        self.names = tuple(rows)
        self.taken = sum(row.taken for row in rows.values())
        self._rows = dict(rows)
        self._section = section

    @classmethod
    def open(cls, path: Path, patch: SparseFile) -> "MaskFile":
        """Open a mask file and check its table; its bits are checked when they are read.

        Raises:
            BadInput: the file is not a mask file, or of a newer format.
            Damage: the table does not match the bytes or the patch.
        """
        path = Path(path)
        file = Checkpoint.open(path)
        version, kind = (file.metadata.get(key) for key in _OWN[:2])
        if (version, kind) != (FORMAT, "mask"):
            raise BadInput(
                f"{path} is not a mask file of a known format",
                expected=f"restitch.format {FORMAT}, restitch.kind mask",
                found=f"format {version}, kind {kind}",
                hint="use the version of restitch that wrote the file, or a newer one",
            )
        metadata = {key: value for key, value in file.metadata.items() if key not in _OWN}
        try:
            rows = _read_table(file.metadata[_OWN[2]], patch)
            section = _section(file, rows)
        except (LookupError, ValueError, RecursionError) as err:
            raise _damage(path, str(err)) from err
        return cls(path, metadata, rows, section)

    def bits(self, name: str) -> Bits:
        """One bit for each weight that the patch keeps of a tensor.

        Raises:
            Damage: the bytes are not an encoding of that many bits.
        """
        row = self._rows[name]
        data = self._section[row.place]
        try:
            code = row.code
            if code == "z":
                code, data = "b", memoryview(_inflated(data, -(-row.count // 8)))
            bits = np.zeros(row.count, dtype=np.bool_)
            for block in decode_blocks(code, data, row.taken, row.count):
                bits[block] = True
        except ValueError as err:
            raise _damage(self.path, f"{name}: {err}") from err
        return bits


def _section(file: Checkpoint, rows: Mapping[str, _Row]) -> memoryview:
    """The bytes of all masks."""
    need = {_SECTION: (torch.uint8, (max((row.place.stop for row in rows.values()), default=0),))}
    found = {name: (file.info(name).dtype, file.info(name).shape) for name in file.names}
    if found != need:
        raise ValueError(f"sections {found}, but the table requires {need}")
    return file.tensor(_SECTION).numpy().data


def _inflated(data: memoryview, size: int) -> bytes:
    """The decompressed data, which must have exactly `size` bytes; no more are produced."""
    inflate = zlib.decompressobj(-15)
    try:
        bitmap = inflate.decompress(data, size + 1)
    except zlib.error as err:
        raise ValueError(f"not a deflated bitmap: {err}") from err
    if len(bitmap) != size or not inflate.eof or inflate.unused_data:
        raise ValueError(f"a deflated bitmap that does not have {size} bytes")
    return bitmap


def _read_table(text: str, patch: SparseFile) -> dict[str, _Row]:
    result: dict[str, _Row] = {}
    start = 0
    for row, name in table_rows(text):
        count, taken, size = (parse_size(row[place]) for place in (0, 1, 3))
        # So nothing that is allocated later can be larger than the patch's own file.
        kept = patch.info(name).kept if name in patch else 0
        if count != kept:
            raise ValueError(f"{count} bits for {name!r}, of which the patch keeps {kept}")
        code = row[2]
        if size != (size if code == "z" else encoded_size(code, taken, kept)):
            raise ValueError(f"{size} bytes for {taken} of {kept} bits in encoding {code!r}")
        if not 0 < taken <= kept:
            raise ValueError(f"{taken} of {kept} bits")
        result[name] = _Row(kept, taken, code, slice(start, start + size))
        start += size
    return result


def _damage(path: Path, found: str) -> Damage:
    return damage(path, "a valid mask file", found)
