"""Hostile checkpoints are refused with an explained error, quickly and in little memory."""

import json
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import save, save_file

from restitch.merging.errors import BadInput
from restitch.merging.files import checkpoint as module
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.header import Header, read_header
from tests.stress.hostile_files import check_checkpoint, checkpoints

GOOD = save({"a": torch.arange(6.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)})


@settings(max_examples=150)
@given(checkpoints())
def test_any_file_is_refused_or_read_as_the_library_reads_it(data: bytes) -> None:
    check_checkpoint(data)


def raw(header: object, data: bytes, *, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HUGE = {
    "a header of 2^63 bytes": raw({"a": entry("F32", [2], 0, 8)}, bytes(8), length=1 << 63),
    "a tensor of 2^62 bytes": raw({"a": entry("U8", [1 << 62], 0, 1 << 62)}, bytes(8)),
    "a shape that overflows to its data": raw(
        {"a": entry("F32", [1 << 33, 1 << 31, 1], 0, 0)}, b""
    ),
    "a million gigabytes of nothing": raw({"a": entry("F64", [0, 1 << 62], 0, 0)}, b""),
    "offsets behind the end": raw({"a": entry("U8", [8], 1 << 62, (1 << 62) + 8)}, bytes(8)),
    "a type of other width": raw({"a": entry("F64", [2], 0, 8)}, bytes(8)),
}

_LIMITED = """
import resource, sys
from pathlib import Path
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.errors import BadInput
import torch
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
for name in sys.argv[1:]:
    try:
        file = Checkpoint.open(Path(name))
        print("read", [tuple(file.tensor(each).shape) for each in file.names])
    except BadInput as error:
        print("refused", error.summary.replace(name, "FILE"))
"""


def test_claimed_sizes_are_never_allocated(tmp_path: Path) -> None:
    files = []
    for number, data in enumerate(HUGE.values()):
        files.append(tmp_path / f"{number}.safetensors")
        files[-1].write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, *map(str, files)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    lines = dict(zip(HUGE, done.stdout.splitlines(), strict=True))
    assert lines.pop("a million gigabytes of nothing") == f"read [(0, {1 << 62})]"
    assert all(line.startswith("refused FILE ") for line in lines.values()), lines
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a\0b", "a\nb", ".", ""])
def test_the_name_of_a_tensor_is_never_a_path_and_can_be_shown(tmp_path: Path, name: str) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(raw({name: entry("F32", [2], 0, 8)}, bytes(8)))
    assert Checkpoint.open(file).names == (name,)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.safetensors"]
    file.write_bytes(raw({name: entry("F32", [3], 0, 8)}, bytes(8)))
    with pytest.raises(BadInput) as caught:
        Checkpoint.open(file)
    assert "\0" not in caught.value.message()
    assert repr(name) in caught.value.message()


@pytest.mark.parametrize("name", ["model.safetensors", "other.safetensors"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(BadInput):
            Checkpoint.open(path)
    with pytest.raises(BadInput, match="not a regular file"):
        read_header(tmp_path / name)


def test_a_device_without_an_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").symlink_to("/dev/zero")
    with pytest.raises(BadInput, match="not a regular file"):
        Checkpoint.open(tmp_path)


def test_a_file_that_shrinks_between_header_and_data_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(GOOD)

    def read_and_truncate(path: Path) -> Header:
        header = read_header(path)
        os.truncate(path, 16)
        return header

    monkeypatch.setattr(module, "read_header", read_and_truncate)
    with pytest.raises(BadInput, match="changed while it was read"):
        Checkpoint.open(file)


@pytest.mark.parametrize("shard", ["n" * 300, "a/" * 3000 + "b", "a\0b", "..", "\ud800"])
def test_a_shard_with_an_impossible_name_is_refused(tmp_path: Path, shard: str) -> None:
    index = {"weight_map": {"a": shard}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput):
        Checkpoint.open(tmp_path)


def test_an_index_of_gigabytes_is_refused_without_reading_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("restitch.merging.files.shards.MAX_INDEX", 1000)
    with (tmp_path / "model.safetensors.index.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BadInput, match="larger than 1,000 bytes"):
        Checkpoint.open(tmp_path)


class Mark:
    """Unpickling it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


def test_a_pickle_named_safetensors_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "it-was-loaded"
    data = pickle.dumps(Mark(mark))
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(BadInput):
        Checkpoint.open(tmp_path)
    assert not mark.exists()
    pickle.loads(data)
    assert mark.exists()  # so loading it would have been noticed


def test_pickles_next_to_safetensors_are_never_loaded(tmp_path: Path) -> None:
    mark = tmp_path / "it-was-loaded"
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scaler.pkl"):
        (folder / name).write_bytes(pickle.dumps(Mark(mark)))
    assert Checkpoint.open(folder).names == ("a",)
    assert not mark.exists()
