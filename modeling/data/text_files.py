"""The bytes and lines of text files: unpacked, UTF-8, with errors that name the file and line.

A file whose first bytes show that it is something else (UTF-16 text, a packed file, a pointer of
Git LFS, ...) is refused by what it is.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

from restitch.merging.errors import BadInput
from restitch.merging.files.safe_open import open_regular
from restitch.modeling.data.file_kinds import compression

# A packed file may hold this many times its own size, and always `_ALWAYS` bytes.
_RATIO = 200
_ALWAYS = 64 << 20
_LFS = b"version https://git-lfs.github.com/spec/"
_BOM = "\ufeff"
# What a file is by its first bytes, and what to do about it.
_MAGIC = (
    (b"\xff\xfe\0\0", "UTF-32 text", "save it as UTF-8"),
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8"),
    (b"\x1f\x8b", "a gzip file", "give it the suffix .gz, or unpack it"),
    (b"BZh", "a bzip2 file", "give it the suffix .bz2, or unpack it"),
    (b"\xfd7zXZ\0", "an xz file", "give it the suffix .xz, or unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", "give it the suffix .zst, or unpack it"),
    (b"PK\x03\x04", "a zip file or a spreadsheet", "unpack it, or save it as CSV"),
    (b"PAR1", "a parquet file", "give it the suffix .parquet"),
    (b"ARROW1", "an arrow file", "give it the suffix .arrow"),
    (_LFS, "a pointer of Git LFS and not the file itself", "run `git lfs pull`"),
)


def open_text(file: Path) -> IO[bytes]:
    """Open a text file for reading its bytes, unpacked if its suffix says that it is packed.

    Raises:
        BadInput: it cannot be read or unpacked, or it is no UTF-8 text by its first bytes.
    """
    stream: IO[bytes]
    try:
        packed = open_regular(file)
        kind = compression(file.name)
        stream = packed if kind is None else _unpacked(file, packed, kind)
        start = stream.read(len(_LFS))
        stream.seek(0)
    except OSError as error:
        raise BadInput(f"{file} cannot be read", found=error.strerror or error) from error
    _check_magic(file, start)
    return stream


def text_lines(file: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a text file, from 1, without their ends.

    Raises:
        BadInput: it cannot be read; names the line.
    """
    number = 0
    with open_text(file) as stream:
        # A line ends at a newline or carriage return only: texts hold other separators.
        for block in stream:
            for line in block.splitlines() or [b""]:
                number += 1
                text = _decoded(file, line, number)
                yield number, text.removeprefix(_BOM) if number == 1 else text


def read_text(file: Path) -> str:
    """The whole text of a file.

    Raises:
        BadInput: it cannot be read; names the line.
    """
    with open_text(file) as stream:
        data = stream.read()
    return _decoded(file, data, 1).removeprefix(_BOM)


def check_pointer(where: str, start: bytes) -> None:
    """Refuse a pointer of Git LFS in place of a file.

    Raises:
        BadInput: the first bytes are those of a pointer.
    """
    if start.startswith(_LFS):
        raise BadInput(f"{where} is {_MAGIC[-1][1]}", hint=_MAGIC[-1][2])


def _check_magic(file: Path, start: bytes) -> None:
    for magic, what, hint in _MAGIC:
        if start.startswith(magic):
            raise BadInput(f"{file} is {what}", expected="UTF-8 text", hint=hint)
    if b"\0" in start:
        raise BadInput(
            f"{file} has NUL bytes",
            expected="UTF-8 text",
            hint="if it is UTF-16, save it as UTF-8",
        )


def _decoded(file: Path, data: bytes, number: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = number + data.count(b"\n", 0, error.start)
        raise BadInput(
            f"{file} line {line} is not UTF-8 text",
            found=f"byte 0x{data[error.start]:02x}: {error.reason}",
            hint="save the file as UTF-8",
        ) from error


def _unpacked(file: Path, packed: IO[bytes], kind: str) -> IO[bytes]:
    limit = max(_ALWAYS, _RATIO * file.stat().st_size)
    try:
        with packed:
            data = _decoder(packed, kind).read(limit + 1)
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise BadInput(f"{file} cannot be unpacked", found=error) from error
    if len(data) > limit:
        raise BadInput(
            f"{file} is too large when it is unpacked",
            expected=f"at most {limit:,} bytes, {_RATIO} times the packed file",
            hint="unpack it",
        )
    return io.BytesIO(data)


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def _decoder(packed: IO[bytes], kind: str) -> _Readable:
    if kind == ".gz":
        return gzip.open(packed)
    if kind == ".bz2":
        return bz2.open(packed)
    if kind == ".xz":
        return lzma.open(packed)
    import pyarrow as pa

    stream: _Readable = pa.CompressedInputStream(pa.PythonFile(packed, mode="r"), "zstd")
    return stream
