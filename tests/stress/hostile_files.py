"""Hostile checkpoints and sparse files for the fuzzer, and the checks of their readers.

An input is a valid file that is damaged in a way specific to its format: lengths, names, types,
shapes, offsets, the table of a sparse file, its coordinates, single bytes. A check returns `read`
or the kind of the error. It raises if a reader fails in another way, needs more memory than the
file's size allows, or reads something else than an independent reader.
"""

import json
import math
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.torch import load, save, save_file

from restitch.merging.errors import BadInput, Damage, RestitchError
from restitch.merging.files.checkpoint import FLOATING, Checkpoint
from restitch.merging.files.coordinate_codec import decode_blocks, encoded_size
from restitch.merging.files.quantized import STEP_DTYPE, Quantized, step_count
from restitch.merging.files.sparse import SparseFile, SparseTensor, write_sparse
from restitch.merging.files.sparse_layout import rows_and_columns

# The limit of a reader's memory: its own objects, and a multiple of the file.
_ALLOWED_BYTES = 4 << 20
_ALLOWED_TIMES = 100

T = TypeVar("T")

SIZES = st.sampled_from(
    [-(1 << 63), -1, 0, 1, 2, 3, 4, 7, 8, 255, 1 << 31, 1 << 32, (1 << 62) + 1, 1 << 63, 1 << 64]
)
NAMES = st.sampled_from(
    ["", ".", "..", "../x", "/etc/passwd", "a\0b", "a\nb", "a b", "__metadata__", "\u202ea", "ä"]
)
JUNK: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    SIZES,
    st.floats(),
    NAMES,
    st.sampled_from(["F32", "F64", "F16", "BF16", "BOOL", "U8", "F31", "F4", "F8_E8M0"]),
    st.lists(SIZES, max_size=4),
    st.dictionaries(NAMES, SIZES, max_size=2),
)


@st.composite
def damaged_bytes(draw: st.DrawFn, good: bytes) -> bytes:
    """Some bytes with a few of them changed, removed, inserted or repeated."""
    data = bytearray(good)
    for _ in range(draw(st.integers(0, 4))):
        begin = draw(st.integers(0, max(len(data) - 1, 0)))
        end = min(begin + draw(st.integers(1, 8)), len(data))
        match draw(st.sampled_from(["set", "flip", "cut", "insert", "repeat", "end"])):
            case "set":
                data[begin:end] = draw(st.binary(min_size=end - begin, max_size=end - begin))
            case "flip" if data:
                data[begin] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[begin:end]
            case "insert":
                data[begin:begin] = draw(st.binary(max_size=8))
            case "repeat":
                data[begin:begin] = data[begin:end]
            case _:
                del data[begin:]
    return bytes(data)


@st.composite
def _tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    dtypes = st.sampled_from([*FLOATING, torch.int64, torch.uint8, torch.bool])
    shapes = st.lists(st.integers(0, 3), max_size=3)
    names = draw(st.lists(st.sampled_from(["a", "b", "c.weight", "ü"]), unique=True, max_size=3))
    tensors = {}
    for name in names:
        tensor = torch.arange(float(np.prod(shape := draw(shapes)))).reshape(shape)
        tensors[name] = tensor.to(draw(dtypes))
    return tensors


@st.composite
def checkpoints(draw: st.DrawFn) -> bytes:
    """The bytes of a safetensors file with a wrong header or damaged bytes."""
    good: bytes = save(draw(_tensors()), draw(st.sampled_from([None, {"format": "pt"}])))
    if draw(st.booleans()):
        return draw(damaged_bytes(good))
    length = int.from_bytes(good[:8], "little")
    pairs = [(name, entry) for name, entry in json.loads(good[8 : 8 + length]).items()]
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(pairs)))
        name, entry = pairs[place] if place < len(pairs) else (draw(NAMES), draw(JUNK))
        match draw(st.sampled_from(["name", "key", "size", "twice", "junk", "drop"])):
            case "name":
                name = draw(NAMES)
            case "key" if isinstance(entry, dict):
                key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
                entry = {**entry, key: draw(JUNK)}
            case "size" if isinstance(entry, dict) and isinstance(entry.get("shape"), list):
                sizes = [*entry["shape"], 1]
                sizes[draw(st.integers(0, len(sizes) - 1))] = draw(SIZES)
                entry = {**entry, "shape": sizes}
            case "twice":
                pairs.append((name, entry))
            case "drop" if place < len(pairs):
                pairs.pop(place)
                continue
            case _:
                entry = draw(JUNK)
        pairs[place : place + 1] = [(name, entry)]
    body = ",".join(f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in pairs)
    header = f"{{{body}}}".encode() + b" " * draw(st.integers(0, 8))
    size = draw(st.one_of(st.just(len(header)), st.sampled_from([0, 1, 1 << 63, (1 << 64) - 1])))
    return size.to_bytes(8, "little") + header + good[8 + length :]


def check_checkpoint(data: bytes) -> str:
    """Check that a checkpoint is refused, or read as the safetensors library reads it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        path.write_bytes(data)
        try:
            file = bounded(len(data), lambda: Checkpoint.open(path))
        except BadInput as error:
            return _named(error, path)
        # Without copies: torch changes a bool that is neither 0 nor 1 into 1.
        ours = {name: file.tensor(name) for name in file.names}
        _ = file.digest(), [file.header_bytes(shard) for shard in file.shards]
    theirs = _by_the_library(data)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape)
        assert _raw(ours[name]) == _raw(tensor)
    return "read"


def _named(error: RestitchError, path: Path) -> str:
    assert str(path) in error.message()
    return type(error).__name__


def _by_the_library(data: bytes) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load(data)
    return tensors


def _raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@st.composite
def sparse_files(draw: st.DrawFn) -> bytes:
    """The bytes of a delta or patch with a damaged table, coordinates or bytes."""
    tensors = []
    weighed, in_8_bits = draw(st.booleans()), draw(st.booleans())
    for name in draw(st.lists(st.sampled_from(["a", "b b", "c"]), unique=True, max_size=3)):
        shape = tuple(draw(st.lists(st.integers(1, 40), max_size=2)))
        numel = int(np.prod(shape))
        chosen = draw(st.sets(st.integers(0, numel - 1), max_size=numel))
        dtype = draw(st.sampled_from(FLOATING))
        values: torch.Tensor | Quantized = torch.arange(float(len(chosen))).to(dtype)
        if in_8_bits:
            codes = torch.arange(len(chosen)).to(torch.int8)
            values = Quantized(codes, torch.ones(step_count(shape)).to(STEP_DTYPE), dtype)
        count = sum(rows_and_columns(shape))
        factors = torch.arange(1.0, count + 1).bfloat16() if weighed else None
        coordinates = torch.tensor(sorted(chosen)).long()
        tensors.append(SparseTensor(name, shape, coordinates, values, factors))
    tensors.sort(key=lambda tensor: tensor.name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x")
        write_sparse(path, tensors, kind="delta", metadata={"base": "00"})
        good = path.read_bytes()
    where = draw(st.sampled_from(["bytes", "table", "metadata", "data"]))
    if where == "bytes":
        return draw(damaged_bytes(good))
    length = int.from_bytes(good[:8], "little")
    header, body = json.loads(good[8 : 8 + length]), good[8 + length :]
    metadata = header["__metadata__"]
    if where == "metadata":
        metadata[draw(st.sampled_from(sorted(metadata)))] = draw(
            st.sampled_from(
                ["", "1", "2", "3", "patch", "[", "[1]", "{}", '["a b c d e"]', "9" * 5000]
            )
        )
    elif where == "table":
        rows = [row.split(" ", 4) for row in json.loads(metadata["restitch.tensors"])]
        for row in rows:
            if draw(st.booleans()):
                row[draw(st.integers(0, 4))] = draw(_FIELDS)
        if draw(st.booleans()):
            rows += rows[:1]
        metadata["restitch.tensors"] = json.dumps([" ".join(row) for row in rows])
    elif body:
        # The sections keep their sizes, so only their content is wrong.
        place = draw(st.integers(0, len(body) - 1))
        body = body[:place] + bytes([draw(st.integers(0, 255))]) + body[place + 1 :]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


_SMALL = 10_000

_FIELDS = st.sampled_from(
    [
        *("F32", "F64", "BF16", "U8", "", "1", "2", "3x3", "1x1", "0", "-1", "40x40", "x", "1e3"),
        *("9223372036854775807", "99999999999999999999", "9223372036854775807x2", "b", "w"),
        *("e0", "e1", "e7", "e62", "e63", "c0", "c1", "c62", "e", "a", "..", "a\0"),
    ]
)


def check_sparse(data: bytes) -> str:
    """Check that a sparse file is refused, or read as a slow reader reads it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x")
        path.write_bytes(data)
        try:
            return bounded(len(data), lambda: _read_sparse(path))
        except (BadInput, Damage) as error:
            return _named(error, path)


def _read_sparse(path: Path) -> str:
    file = _opened(path)
    sections = Checkpoint.open(path)
    rows = json.loads(sections.metadata["restitch.tensors"])
    position = 0
    for row, name in zip(rows, file.names, strict=True):
        info, code = file.info(name), row.split(" ", 4)[3]
        size = encoded_size(code, info.kept, info.numel)
        encoded = bytes(sections.tensor_bytes("positions"))[position : position + size]
        position += size
        coordinates = file.coordinates(name)
        expected = decode_slowly(code, encoded, info.kept, info.numel)
        assert coordinates.tolist() == expected
        if not file.is_quantized or info.numel <= _SMALL:
            assert file.values(name).numel() == info.kept
        factors = file.factors(name)
        assert (factors is None) == ("factors" not in sections.names)
        if factors is not None:
            count = [part.numel() for part in factors]
            assert count == [*rows_and_columns(info.shape)]
            assert all(0 < float(value) < math.inf for part in factors for value in part[:50])
        if info.numel <= _SMALL:
            # In parts, as stitching reads them, they are the same.
            cursor, start, parts = file.cursor(name), 0, list[int]()
            while start < info.numel:
                parts += [start + int(c) for found, _ in cursor.advance(7) for c in found]
                start += 7
            assert parts == expected
    return "read"


def _opened(path: Path) -> SparseFile:
    """Open a sparse file, with a matching base if it needs one."""
    file = SparseFile.open(path)
    if not file.is_quantized:
        return file
    infos = [file.info(name) for name in file.names if file.info(name).numel <= _SMALL]
    base = path.parent / "base.safetensors"
    save_file({one.name: torch.zeros(one.shape, dtype=one.dtype) for one in infos}, base)
    return SparseFile.open(path, Checkpoint.open(base))


@st.composite
def positions(draw: st.DrawFn) -> tuple[str, bytes, int, int]:
    """A code, encoded coordinates, their number, and the size of their tensor."""
    code = draw(st.sampled_from(["w", "b"]) | st.builds(
        lambda letter, low: f"{letter}{low}", st.sampled_from("ec"), st.integers(0, 12)
    ))  # fmt: skip
    # Coordinates take little or no space in these codes, so limit their number here.
    few = code[0] in "wcb"
    numel = draw(st.integers(1, 300 if few else 1 << draw(st.sampled_from([4, 8, 20]))))
    kept = numel if code == "w" else draw(st.integers(1, min(numel, 60)))
    try:
        size = encoded_size(code, kept, numel)
    except ValueError:
        size = draw(st.integers(0, 40))
    if size > 2_000:
        return code, b"", kept, numel
    density = draw(st.sampled_from([0.02, 0.2, 0.5]))
    seed = draw(st.integers(0, 1 << 32))
    bits = np.random.default_rng(seed).random(8 * size) < density
    return code, np.packbits(bits).tobytes(), kept, numel


def check_positions(given: tuple[str, bytes, int, int]) -> str:
    """Check that encoded coordinates are refused, or decoded as a slow reader decodes them."""
    code, data, kept, numel = given
    try:
        blocks = list(decode_blocks(code, memoryview(data), kept, numel))
    except ValueError:
        return "ValueError"
    assert [int(c) for block in blocks for c in block] == decode_slowly(code, data, kept, numel)
    return "read"


def decode_slowly(code: str, data: bytes, kept: int, numel: int) -> list[int]:
    """Decode by the layout in `coordinate_codec`, bit by bit."""

    def bit(place: int) -> int:
        return data[place // 8] >> place % 8 & 1

    if code == "w":
        return list(range(numel))
    if code == "b":
        return [place for place in range(numel) if bit(place)]
    stored, low = (kept if code[0] == "e" else numel - kept), int(code[1:])
    found, begin, shift = [0] * stored, 0, 0
    for width in (32, 16, 8, 4, 2, 1):
        if low & width:
            for index in range(stored):
                for one in range(width):
                    found[index] |= bit(begin + index * width + one) << shift + one
            begin += -(-stored * width // 8) * 8
            shift += width
    ones = [p for p in range(stored + (numel - 1 >> low)) if bit(begin + p)]
    found = [
        part | (place - index << low)
        for index, (part, place) in enumerate(zip(found, ones, strict=True))
    ]
    if code[0] == "e":
        return found
    left_out = set(found)
    return [place for place in range(numel) if place not in left_out]


def bounded(size: int, read: Callable[[], T]) -> T:
    """The result of a reader, after a check of its peak memory."""
    tracemalloc.start()
    try:
        return read()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < _ALLOWED_BYTES + _ALLOWED_TIMES * size, f"{peak} bytes for a file of {size}"
