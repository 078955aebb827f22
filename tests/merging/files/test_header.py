import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.header import read_header, write_header

GOOD: dict[str, Any] = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "BF16", "shape": [2, 1], "data_offsets": [8, 12]},
}


def raw(header: object, data: bytes = bytes(12), *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def changed(change: Callable[[dict[str, Any]], Any]) -> bytes:
    header = json.loads(json.dumps(GOOD))
    change(header)
    return raw(header)


BAD = {
    "empty": b"",
    "seven bytes": b"1234567",
    "header of 2^63 bytes": raw(GOOD, length=1 << 63),
    "header of 2^64 - 1 bytes": raw(GOOD, length=(1 << 64) - 1),
    "header longer than the file": raw(GOOD, b"", length=10_000),
    "header cut short": raw(GOOD)[:40],
    "data cut short": raw(GOOD)[:-1],
    "data too long": raw(GOOD, bytes(13)),
    "no JSON": raw(b"{not json"),
    "no UTF-8": raw(b'{"\xff": 1}'),
    "half a surrogate": raw(b'{"\\ud800": {"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'),
    "deep nesting": raw(b"[" * 200_000),
    "huge number": raw(b'{"a": ' + b"9" * 5000 + b"}"),
    "a list": raw([]),
    "duplicate names": raw(
        b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},'
        b'"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'
    ),
    "overlap": changed(lambda h: h["b"].update(data_offsets=[4, 8])),
    "hole": raw({**GOOD, "b": {**GOOD["b"], "data_offsets": [9, 13]}}, bytes(13)),
    "late begin": raw({"b": {**GOOD["b"], "data_offsets": [8, 12]}}),
    "end before begin": changed(lambda h: h["b"].update(data_offsets=[12, 8])),
    "shape too large": changed(lambda h: h["a"].update(shape=[3])),
    "shape too small": changed(lambda h: h["a"].update(shape=[1])),
    "shape whose product overflows": changed(lambda h: h["a"].update(shape=[1 << 62, 1 << 62])),
    "shape of 2^64 + 2 by overflow": changed(lambda h: h["a"].update(shape=[(1 << 64) + 2])),
    "negative shape": changed(lambda h: h["a"].update(shape=[-1, -2])),
    "true as a size": changed(lambda h: h["a"].update(shape=[True, 2])),
    "fraction": changed(lambda h: h["a"].update(shape=[2.0])),
    "three offsets": changed(lambda h: h["a"].update(data_offsets=[0, 8, 8])),
    "unknown type": changed(lambda h: h["a"].update(dtype="F31")),
    "type that is no text": changed(lambda h: h["a"].update(dtype=["F32"])),
    "unknown key": changed(lambda h: h["a"].update(more=1)),
    "missing key": changed(lambda h: h["a"].pop("shape")),
    "entry that is no table": changed(lambda h: h.update(a=1)),
    "metadata that are no text": changed(lambda h: h.update(__metadata__={"a": 1})),
}


@pytest.mark.parametrize("data", BAD.values(), ids=list(BAD))
def test_a_bad_header_is_refused_and_names_the_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(BadInput) as caught:
        Checkpoint.open(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint


def test_the_good_header_of_these_tests_is_read(tmp_path: Path) -> None:
    (tmp_path / "good.safetensors").write_bytes(raw(GOOD))
    assert Checkpoint.open(tmp_path / "good.safetensors").names == ("a", "b")


@settings(max_examples=150)
@given(st.data())
def test_a_damaged_file_is_read_as_the_library_reads_it_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    good = save({"w": torch.arange(6.0).view(2, 3), "i": torch.arange(3)}, {"format": "pt"})
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))] or damaged)
    try:
        checkpoint = Checkpoint.open(path)
    except BadInput:
        return
    theirs = load_file(path)
    assert set(theirs) == set(checkpoint.names)
    for name, value in theirs.items():
        mine = checkpoint.tensor(name)
        assert mine.dtype == value.dtype
        assert mine.view(torch.uint8).equal(value.view(torch.uint8))


def test_a_written_header_is_read_back_and_padded(tmp_path: Path) -> None:
    entries = [("b", torch.bfloat16, (3,)), ("a", torch.float32, (1, 2)), ("s", torch.int64, ())]
    header = write_header(entries, {"format": "pt"})
    assert len(header) % 8 == 0
    (tmp_path / "f").write_bytes(header + bytes(6 + 8 + 8))
    found = read_header(tmp_path / "f")
    assert [(entry.name, entry.dtype, entry.shape) for entry in found.entries] == entries
    assert found.metadata == {"format": "pt"}
