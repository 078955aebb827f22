"""The header of a safetensors file, read without trusting it.

`read_header` checks everything in the header against the size of the file: lengths,
types, shapes, and offsets that must neither overlap nor leave gaps. Any error is a
`BadInput` that names the file, raised before anything is allocated or mapped.
`write_header` is the counterpart.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from restitch.merging.errors import BadInput
from restitch.merging.files.mapped_file import MAX_HEADER
from restitch.merging.files.safe_open import open_regular

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_DAMAGED = "fetch or save the file again; it is damaged or incomplete"


@dataclass(frozen=True)
class HeaderEntry:
    """One tensor in a header; `begin` and `end` count from the start of the data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header, with its entries in their order in the file."""

    entries: tuple[HeaderEntry, ...]
    metadata: dict[str, str]
    data_start: int
    size: int


def count_elements(shape: Iterable[int]) -> int:
    """The product of a shape, in Python integers that cannot overflow."""
    count = 1
    for extent in shape:
        count *= extent
    return count


def read_header(path: Path) -> Header:
    """Read and check the header of the safetensors file at `path`."""
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            first = file.read(8)
            length = int.from_bytes(first, "little")
            if first == b"version ":
                raise _pointer(path)
            if size < 8:
                raise _bad(path, "is too short for a safetensors file", "8 bytes or more", size)
            if length > min(size - 8, MAX_HEADER):
                raise _bad(
                    path,
                    "has a header longer than the file",
                    f"at most {min(size - 8, MAX_HEADER)} bytes of header",
                    f"a header of {length} bytes in a file of {size}",
                )
            raw = file.read(length)
    except OSError as err:
        raise BadInput(
            f"{path} cannot be read",
            expected="a readable safetensors file",
            found=err.strerror or str(err),
            hint="check the path and its permissions",
        ) from err
    return _check(path, _parse(path, raw), data_start=8 + length, size=size)


def write_header(
    entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """The length and header of a file that contains `entries` one after the other."""
    table: dict[str, object] = {}
    if metadata:
        table["__metadata__"] = dict(metadata)
    begin = 0
    for name, dtype, shape in entries:
        end = begin + count_elements(shape) * dtype.itemsize
        offsets = [begin, end]
        table[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
        begin = end
    raw = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _pointer(path: Path) -> BadInput:
    return BadInput(
        f"{path} is a pointer of Git LFS, not the weights",
        expected="a safetensors file",
        found="a text file that begins with 'version '",
        hint="fetch the weights with `git lfs pull` in the folder",
    )


def _bad(path: Path, what: str, expected: object, found: object) -> BadInput:
    return BadInput(f"{path} {what}", expected=expected, found=found, hint=_DAMAGED)


def _parse(path: Path, raw: bytes) -> dict[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = sorted(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
            raise _bad(path, "has repeated names in its header", "each name once", twice)
        return result

    try:
        table = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
        json.dumps(table, ensure_ascii=False).encode("utf-8")  # refuses half a surrogate pair
    except (ValueError, RecursionError) as err:
        raise _bad(path, "has a header that is not JSON", "a JSON object", err) from err
    if not isinstance(table, dict):
        raise _bad(path, "has a header of the wrong type", "a JSON object", type(table).__name__)
    return table


def _check(path: Path, table: dict[str, object], *, data_start: int, size: int) -> Header:
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise _bad(path, "has metadata that is not text", "names with string values", metadata)
    entries = tuple(_entry(path, name, value) for name, value in table.items())
    end = 0
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != end:
            problem = "overlap" if entry.begin < end else "leave a gap"
            raise _bad(
                path,
                f"has tensors that {problem} at {entry.name!r}",
                f"data from byte {end}",
                f"data from byte {entry.begin}",
            )
        end = entry.end
    if end != size - data_start:
        raise _bad(
            path,
            "does not have the size that its header gives",
            f"{data_start + end} bytes",
            f"{size} bytes",
        )
    return Header(entries=entries, metadata=dict(metadata), data_start=data_start, size=size)


def _entry(path: Path, name: str, value: object) -> HeaderEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _bad(
            path, f"has a bad header entry for {name!r}", "dtype, shape and data_offsets", value
        )
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise BadInput(
            f"{path} contains {name!r} in an unknown type",
            expected=", ".join(DTYPES),
            found=value["dtype"],
            hint="use the model before quantization, in float32, bfloat16 or float16",
        )
    shape, offsets = value["shape"], value["data_offsets"]
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _bad(
            path,
            f"has a bad shape or bad offsets for {name!r}",
            "whole numbers of at least 0",
            f"shape {shape}, offsets {offsets}",
        )
    begin, end = offsets
    need = count_elements(shape) * dtype.itemsize
    if end - begin != need:
        raise _bad(
            path,
            f"has a size for {name!r} that does not fit its shape",
            f"{need} bytes for {value['dtype']} {shape}",
            f"{end - begin} bytes",
        )
    return HeaderEntry(name, dtype, tuple(shape), begin, end)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 1 << 63 for item in value
    )
