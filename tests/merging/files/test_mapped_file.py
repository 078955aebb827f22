import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from restitch.merging.files import mapped_file
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.mapped_file import MappedFile, hashing_ahead

TENSORS = {"a": torch.arange(6.0), "b": torch.ones(2, 2), "empty": torch.empty(0)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(TENSORS, folder / "model.safetensors")
    return folder


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The ranges that were hashed."""
    ranges: list[tuple[int, int]] = []
    digest = MappedFile._digest

    def noting(file: MappedFile, start: int, size: int) -> str:
        ranges.append((start, size))
        return digest(file, start, size)

    monkeypatch.setattr(MappedFile, "_digest", noting)
    return ranges


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_digests_computed_ahead_are_those_of_the_checkpoint(
    saved: Path, hashed: list[tuple[int, int]], name: str
) -> None:
    expected = Checkpoint.open(saved).digest()
    hashed.clear()
    with hashing_ahead([str(saved / name)]):
        assert Checkpoint.open(saved).digest() == expected
    assert len(hashed) == len(TENSORS)


def test_a_file_that_was_replaced_meanwhile_is_hashed_again(saved: Path) -> None:
    file = saved / "model.safetensors"
    with hashing_ahead([str(saved)]):
        save_file({**TENSORS, "a": torch.zeros(6)}, saved / "other")
        (saved / "other").replace(file)
        found = Checkpoint.open(saved).digest()
    assert found == Checkpoint.open(saved).digest()


def test_a_digest_that_was_not_computed_in_time_is_computed_later(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Checkpoint.open(saved).digest()

    class Never(ThreadPoolExecutor):
        def submit(self, *_: object) -> Future[str]:  # type: ignore[override]
            future: Future[str] = Future()
            future.cancel()
            return future

    with monkeypatch.context() as patch:
        patch.setattr(mapped_file, "ThreadPoolExecutor", Never)
        with hashing_ahead([str(saved)]):
            checkpoint = Checkpoint.open(saved)
    assert checkpoint.digest() == expected


@pytest.mark.parametrize(
    "data",
    [b"", b"short", b"\xff" * 16, (2).to_bytes(8, "little") + b"[]", b"\2" + b"\0" * 7 + b"1 "],
)
def test_what_cannot_be_read_is_left_to_the_block(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bad.safetensors").write_bytes(data)
    with hashing_ahead([str(tmp_path), str(tmp_path / "missing"), "owner/name", "s3://b/m"]):
        pass


def test_hashing_starts_without_torch() -> None:
    code = (
        "import sys, restitch.merging.files.mapped_file; print({'torch', 'numpy'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
