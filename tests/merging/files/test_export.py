import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from restitch.merging.errors import BadInput
from restitch.merging.files import export as module
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.edits import Edits, StreamedEdits, edited
from restitch.merging.files.export import Previous, export_weights
from restitch.merging.numerics.rounding import round_once
from restitch.merging.rules.stitch import stitch
from tests import tiny


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return tiny.save(tmp_path / "base", {**tiny.base_tensors(), "empty": torch.empty(0, 3)})


@pytest.fixture
def sharded(tmp_path: Path) -> Checkpoint:
    return tiny.save(tmp_path / "sharded", tiny.base_tensors(), shards=3)


def stitched(tmp_path: Path, base: Checkpoint) -> Edits:
    return stitch(base, [tiny.member(tmp_path, base, task, i) for i, task in enumerate("ab")])


def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def check(folder: Path, base: Checkpoint, edits: Edits) -> None:
    """Every tensor is the edited one, by our reader and by the library's."""
    found = Checkpoint.open(folder)
    assert found.names == base.names
    for file in found.files.values():
        for name, value in load_file(file).items():
            assert torch.equal(value, edited(base, edits, name))
            assert torch.equal(found.tensor(name), value)


def test_without_edits_the_files_are_those_of_the_base(tmp_path: Path, base: Checkpoint) -> None:
    folder = out(tmp_path)
    export_weights(base, stitch(base, []), folder)
    written, original = folder / "model.safetensors", base.files["model.safetensors"]
    assert written.read_bytes() == original.read_bytes()


def test_edits_change_their_tensors_and_no_other_byte(tmp_path: Path, base: Checkpoint) -> None:
    folder, edits = out(tmp_path), stitched(tmp_path, base)
    export_weights(base, edits, folder)
    check(folder, base, edits)
    written = (folder / "model.safetensors").read_bytes()
    original = base.files["model.safetensors"].read_bytes()
    assert len(written) == len(original)
    changed = {i for i, (a, b) in enumerate(zip(written, original, strict=True)) if a != b}
    allowed = set()
    for name in edits.names:
        start = base.location(name).start
        allowed |= set(range(start, start + base.info(name).nbytes))
    assert changed
    assert changed <= allowed


def test_tensors_are_edited_part_by_part(
    tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, edits = out(tmp_path), stitched(tmp_path, base)
    assert isinstance(edits, StreamedEdits)
    monkeypatch.setattr(module, "_PART", 24)
    export_weights(base, edits, folder)
    check(folder, base, edits)


def test_edits_that_need_the_whole_tensor_get_it(tmp_path: Path, base: Checkpoint) -> None:
    class Reversed:
        names = ("embed.weight",)

        def apply(self, name: str, flat: torch.Tensor) -> None:
            flat.copy_(flat.flip(0))

    folder = out(tmp_path)
    export_weights(base, Reversed(), folder)
    check(folder, base, Reversed())


def test_the_shards_are_those_of_the_base(tmp_path: Path, sharded: Checkpoint) -> None:
    folder, edits = out(tmp_path), stitched(tmp_path, sharded)
    export_weights(sharded, edits, folder)
    check(folder, sharded, edits)
    found = Checkpoint.open(folder)
    assert found.shards == sharded.shards
    assert found.shard_metadata == sharded.shard_metadata
    for shard in sharded.shards:
        assert found.header_bytes(shard) == sharded.header_bytes(shard)


def test_a_single_file_of_any_name_is_exported_under_the_standard_name(
    tmp_path: Path, base: Checkpoint
) -> None:
    path = tmp_path / "tower.safetensors"
    path.write_bytes(base.files["model.safetensors"].read_bytes())
    folder = out(tmp_path)
    export_weights(Checkpoint.open(path), stitch(base, []), folder)
    assert [item.name for item in folder.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("size", [1, 300, 10_000])
@pytest.mark.parametrize("which", ["base", "sharded"])
def test_a_shard_size_distributes_the_tensors_to_new_files(
    tmp_path: Path, request: pytest.FixtureRequest, which: str, size: int
) -> None:
    source: Checkpoint = request.getfixturevalue(which)
    folder, edits = out(tmp_path), stitched(tmp_path, source)
    export_weights(source, edits, folder, shard_size=size)
    check(folder, source, edits)
    found = Checkpoint.open(folder)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if size == 10_000:
        assert files == ["model.safetensors"]
        assert not (folder / "model.safetensors.index.json").exists()
    else:
        count = len(files)
        assert count > 1
        assert files == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == source.nbytes
        for names in found.shards.values():
            sizes = [source.info(name).nbytes for name in names]
            assert sum(sizes) <= size or len([s for s in sizes if s]) == 1
    assert found.digest() == Checkpoint.open(folder).digest()
    for file in found.files.values():
        with safe_open(file, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}


@pytest.mark.parametrize("which", ["base", "sharded"])
def test_extra_tensors_are_exported_too(
    tmp_path: Path, request: pytest.FixtureRequest, which: str
) -> None:
    source: Checkpoint = request.getfixturevalue(which)
    folder, edits = out(tmp_path), stitched(tmp_path, source)
    head = torch.arange(6.0).view(2, 3).t()
    export_weights(source, edits, folder, extra={"head.weight": head, "none": torch.empty(0)})
    found = Checkpoint.open(folder)
    assert set(found.names) == {*source.names, "head.weight", "none"}
    assert torch.equal(found.tensor("head.weight"), head)
    for name in source.names:
        assert torch.equal(found.tensor(name), edited(source, edits, name))
    with pytest.raises(ValueError):
        export_weights(source, edits, folder, extra={"embed.weight": head})


def test_a_file_system_that_cannot_copy_ranges_gets_the_same_bytes(
    tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    monkeypatch.setattr(module, "_BLOCK", 7)
    folder, edits = out(tmp_path), stitched(tmp_path, base)
    export_weights(base, edits, folder)
    check(folder, base, edits)


def test_a_full_disk_is_reported(
    tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        export_weights(base, stitched(tmp_path, base), out(tmp_path))


def test_progress_ends_with_all_bytes(tmp_path: Path, sharded: Checkpoint) -> None:
    seen: list[tuple[int, int]] = []
    export_weights(
        sharded,
        stitch(sharded, []),
        out(tmp_path),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (sharded.nbytes, sharded.nbytes)


class Added:
    """Adds one to whole tensors."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def apply(self, name: str, flat: torch.Tensor) -> None:
        flat += 1


def test_files_without_a_change_are_taken_from_an_earlier_export(
    tmp_path: Path, sharded: Checkpoint
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    assert export_weights(sharded, Added("embed.weight"), first) == ()
    changed = {shard for shard, names in sharded.shards.items() if "embed.weight" in names}
    previous = Previous(first, frozenset({"embed.weight"}))
    taken = export_weights(sharded, Added(), second, previous=previous)
    assert set(taken) == sharded.shards.keys() - changed
    assert taken
    check(second, sharded, Added())
    for name in taken:
        assert (second / name).samefile(first / name)


@pytest.mark.parametrize("broken", ["missing", "shorter", "header"])
def test_a_file_that_is_not_whole_is_not_taken(
    tmp_path: Path, sharded: Checkpoint, broken: str
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    export_weights(sharded, Added(), first)
    name = next(iter(sharded.shards))
    data = (first / name).read_bytes()
    (first / name).unlink()
    if broken != "missing":
        (first / name).write_bytes(data[:-1] if broken == "shorter" else data[:8] + b" " + data[9:])
    taken = export_weights(sharded, Added(), second, previous=Previous(first, frozenset()))
    assert name not in taken
    check(second, sharded, Added())


@pytest.mark.parametrize("own", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 2])
def test_another_type_rounds_the_wide_result_once(
    tmp_path: Path, own: torch.dtype, dtype: torch.dtype, shards: int
) -> None:
    tensors = {**tiny.base_tensors(dtype=own), "empty": torch.empty(0, 3, dtype=own)}
    base = tiny.save(tmp_path / "base", tensors, shards=shards)
    edits = stitched(tmp_path, base)
    folder = out(tmp_path)
    export_weights(base, edits, folder, dtype=dtype)
    found = Checkpoint.open(folder)
    assert found.names == base.names
    assert found.files.keys() == base.files.keys()
    for name in base.names:
        before = base.tensor(name)
        if name in base.floating:
            wide = before.to(torch.promote_types(own, torch.float32), copy=True)
            if name in edits.names:
                edits.apply(name, wide.view(-1))
            before = round_once(wide.view(-1), dtype).view(before.shape)
        assert torch.equal(found.tensor(name), before)
    if dtype == own:
        assert [p.read_bytes() for p in found.files.values()] == [
            p.read_bytes() for p in exported(tmp_path / "same", base, edits).files.values()
        ]


def exported(folder: Path, base: Checkpoint, edits: Edits) -> Checkpoint:
    folder.mkdir()
    export_weights(base, edits, folder)
    return Checkpoint.open(folder)


def test_a_type_that_is_too_narrow_is_refused(tmp_path: Path) -> None:
    tensors = {**tiny.base_tensors(), "layers.1.norm.weight": torch.full((8,), -1e5)}
    base = tiny.save(tmp_path / "base", tensors)
    with pytest.raises(BadInput, match=r"norm\.weight do not fit into float16") as caught:
        export_weights(base, stitch(base, []), out(tmp_path), dtype=torch.float16)
    assert (caught.value.expected, caught.value.found) == ("weights of at most 65504", "100000")
