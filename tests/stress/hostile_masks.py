"""Hostile specialists for the fuzzer: mask files that do not match their patch.

An input is a mask file that is damaged in a way specific to its format (its table, the streams of
its encodings, the patch that it names, the scale, single bytes), with a patch that matches it or
almost matches it. `check_mask` opens it as an export does. The reader must not fail without an
explanation, need more memory than the sizes of the files allow, or select other weights than a
slow reader of the same bytes.
"""

import json
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

from restitch.merging.digests import digest_file
from restitch.merging.errors import BadInput, Damage, RestitchError
from restitch.merging.experts.files import StoredExpert, open_expert
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.mask_file import Bits, MaskWriter
from restitch.merging.files.sparse import SparseFile, SparseTensor, write_sparse
from tests.stress.hostile_files import JUNK, SIZES, bounded, damaged_bytes, decode_slowly

NAMES = ("a", "b b", "c", "ü")
TABLE = "restitch.masks"


class HostileMask(NamedTuple):
    """A mask file's bytes, and the sizes of its patch.

    Attributes:
        kept: the number of weights that the patch keeps of each tensor.
    """

    data: bytes
    kept: dict[str, int]


def write_patch(folder: Path, kept: dict[str, int]) -> Path:
    """Write a patch that keeps every third weight of each tensor, and its base next to it."""
    path, base = folder / "patch", folder / "base.safetensors"
    tensors = [
        SparseTensor(name, (3 * count,), 3 * torch.arange(count), torch.arange(1.0, count + 1))
        for name, count in sorted(kept.items())
    ]
    write_sparse(path, tensors, kind="patch", metadata={"base": "00"})
    save_file({tensor.name: torch.zeros(tensor.shape) for tensor in tensors}, base)
    return path


@st.composite
def masks(draw: st.DrawFn) -> HostileMask:
    """A mask file with a damaged table, streams, metadata or bytes, and a patch."""
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=3))
    kept = {name: draw(st.integers(1, 300)) for name in names}
    shares = {name: draw(st.sampled_from([0.0, 0.02, 0.3, 0.5, 0.9, 1.0])) for name in names}
    random = np.random.default_rng(draw(st.integers(0, 1 << 16)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shared = digest_file(write_patch(folder, kept))
        scale = draw(st.sampled_from([1.0, 0.5, 3.25]))
        with MaskWriter(folder) as writer:
            for tensor in sorted(kept):
                writer.add(tensor, random.random(kept[tensor]) < shares[tensor])
            more = {"base": "00", "shared": shared, "scale": scale.hex(), "task": "x"}
            writer.finish(folder / "mask", more)
        good = (folder / "mask").read_bytes()
    if kept and draw(st.integers(0, 9)) == 0:  # another patch under the same digest
        kept[draw(st.sampled_from(sorted(kept)))] += draw(st.sampled_from([-1, 1, 8]))
        kept = {tensor: count for tensor, count in kept.items() if count > 0}
    where = draw(st.sampled_from(["bytes", "table", "metadata", "stream", "body"]))
    if where == "bytes":
        return HostileMask(draw(damaged_bytes(good)), kept)
    length = int.from_bytes(good[:8], "little")
    header, body = json.loads(good[8 : 8 + length]), good[8 + length :]
    metadata = header["__metadata__"]
    if where == "metadata":
        key = draw(st.sampled_from(sorted(metadata)))
        metadata[key] = draw(st.sampled_from(_TEXTS))
    elif where == "table":
        metadata[TABLE] = json.dumps(draw(_tables(json.loads(metadata[TABLE]))))
    elif where == "stream":
        header, body = draw(_streams(header, body))
    elif body:
        place = draw(st.integers(0, len(body) - 1))
        body = body[:place] + bytes([draw(st.integers(0, 255))]) + body[place + 1 :]
    text = json.dumps(header).encode()
    return HostileMask(len(text).to_bytes(8, "little") + text + body, kept)


_TEXTS = (
    *("", "1", "2", "delta", "patch", "[", "[1]", "{}", "null", '["1 1 w 0 a"]', "9" * 5000),
    *("nan", "inf", "-inf", "-0x1p+0", "0x1p+99999", "0x1p+1023", "0x1p-1074", "1e999", "0x"),
    *("../../etc/passwd", "/dev/zero", "00", "a" * 64, "\u202e", "[" * 100_000),
)

_FIELDS = st.sampled_from(
    [
        *("0", "1", "2", "7", "8", "300", "-1", "x", "", "1e3", "²", "9" * 18, "9" * 30),
        *("w", "b", "z", "q", "e0", "e1", "e5", "e62", "e63", "c0", "c2", "e", "e-1"),
        *("a", "b b", "c", "d", "..", "a\0", "\ud800"),
    ]
)


@st.composite
def _tables(draw: st.DrawFn, rows: list[str]) -> object:
    """A table of masks with changed words, rows or order, or something else instead."""
    words = [row.split(" ", 4) for row in rows]
    for row in words:
        if draw(st.booleans()):
            row[draw(st.integers(0, 4))] = draw(_FIELDS | SIZES.map(str))
    match draw(st.sampled_from(["words", "twice", "turned", "less", "junk"])):
        case "twice":
            words += words[:1]
        case "turned":
            words.reverse()
        case "less":
            words = words[1:]
        case "junk":
            return draw(JUNK | st.lists(JUNK, max_size=2))
    return [" ".join(row) for row in words]


@st.composite
def _streams(
    draw: st.DrawFn, header: dict[str, dict[str, object]], body: bytes
) -> tuple[dict[str, dict[str, object]], bytes]:
    """All masks, deflated again: of the right size, far too large, or incomplete."""
    metadata = header["__metadata__"]
    rows, parts = [], []
    for row in json.loads(str(metadata[TABLE])):
        count, taken, _, _, name = row.split(" ", 4)
        size = -(-int(count) // 8)
        plain = draw(
            st.binary(min_size=size, max_size=size)
            | st.sampled_from([b"\xff" * size, b"\0" * size, b"\0" * (size + 1), b"\0" * (1 << 22)])
        )
        level, strategy = draw(st.integers(0, 9)), draw(st.integers(0, 4))
        deflate = zlib.compressobj(level, zlib.DEFLATED, -15, 9, strategy)
        data = deflate.compress(plain) + deflate.flush()
        data += draw(st.sampled_from([b"", b"", b"\0", data]))
        data = data[: len(data) - draw(st.sampled_from([0, 0, 0, 1, 4]))]
        right = int(np.unpackbits(np.frombuffer(plain, np.uint8)).sum())
        taken = draw(st.sampled_from([str(min(max(right, 1), int(count))), taken]))
        rows.append(f"{count} {taken} z {len(data)} {name}")
        parts.append(data)
    metadata[TABLE] = json.dumps(rows)
    body = b"".join(parts)
    header["masks"] = {"dtype": "U8", "shape": [len(body)], "data_offsets": [0, len(body)]}
    return header, body


def check_mask(given: HostileMask) -> str:
    """Check that a specialist is refused, or read as a slow reader reads it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        patch, path = write_patch(folder, given.kept), folder / "mask"
        path.write_bytes(given.data)
        base = Checkpoint.open(folder / "base.safetensors")
        size = len(given.data) + patch.stat().st_size
        refused: RestitchError
        try:
            return bounded(size, lambda: _read(path, patch, base))
        except (BadInput, Damage) as error:
            refused = error
        assert str(folder) in refused.message()
        return type(refused).__name__


def _read(path: Path, patch: Path, base: Checkpoint) -> str:
    def checked_patch(digest: str) -> Path:
        if digest != digest_file(patch):
            raise Damage(f"the patch {digest!r} is not in {patch.parent}")
        return patch

    # A patch of another size stands for a damaged store.
    edits = open_expert(
        path, lambda digest: patch if _is_digest(digest) else checked_patch(digest), base
    )
    if not isinstance(edits, StoredExpert):
        assert isinstance(edits, SparseFile)
        return "read as a patch"
    shared = SparseFile.open(patch)
    actual = {name: edits.mask.bits(name) for name in edits.names}
    slow = _slowly(path)
    assert actual.keys() == slow.keys()
    for name, bits in slow.items():
        assert np.array_equal(actual[name], bits)
        before = base.tensor(name).reshape(-1)
        flat, parts = before.clone(), before.clone()
        edits.apply(name, flat)
        edit = edits.editor(name)
        for start in range(0, len(parts), 7):
            edit(parts[start : start + 7])
        assert flat.view(torch.int32).equal(parts.view(torch.int32))
        expected = before.double()
        places = shared.coordinates(name)[torch.from_numpy(bits)]
        taken = shared.values(name)[torch.from_numpy(bits)].double()
        expected[places] += edits.scale * (taken - expected[places])
        assert flat.view(torch.int32).equal(expected.float().view(torch.int32))
    return "read"


def _is_digest(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef") and text != "a" * 64


def _slowly(path: Path) -> dict[str, Bits]:
    """Decode by the layout in `mask_file`, bit by bit."""
    file = Checkpoint.open(path)
    section, begin = bytes(file.tensor_bytes("masks")), 0
    found = {}
    for row in json.loads(file.metadata[TABLE]):
        count, taken, code, size, name = row.split(" ", 4)
        data = section[begin : begin + int(size)]
        begin += int(size)
        if code == "z":
            code, data = "b", zlib.decompress(data, wbits=-15)
        bits = np.zeros(int(count), np.bool_)
        bits[decode_slowly(code, data, int(taken), int(count))] = True
        found[name] = bits
    return found
