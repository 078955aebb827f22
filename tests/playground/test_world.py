import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from playground import building, make
from playground.building import SIZES, Builder
from playground.make import LOCK, MANIFEST, World, make_world
from playground.skills import GENERAL, TASKS, Skill
from playground.training import one_thread, pixels, zero_shot_head
from restitch.merging.errors import BadInput, Unavailable, UsageError
from restitch.modeling.data.task_data import Example, TaskData
from restitch.modeling.families.clip import Clip
from restitch.registry.specs.data import DataSpec
from restitch.registry.specs.files import load_line, load_task
from restitch.registry.specs.head import HeadSpec
from restitch.registry.specs.task import TaskSpec


def files(world: World) -> dict[str, bytes]:
    found = [p for p in world.root.rglob("*") if p.is_file()]
    return {str(p.relative_to(world.root)): p.read_bytes() for p in found}


@pytest.fixture
def copy(small: World, tmp_path: Path) -> World:
    shutil.copytree(small.root, tmp_path / "copy")
    return World(tmp_path / "copy", small.tasks)


def test_the_same_seed_gives_the_same_bytes_for_any_number_of_threads(
    small: World, tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    try:
        again = make_world(tmp_path / "again", "small")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(before, torch.random.get_rng_state())
    assert files(again) == files(small)


def test_a_run_after_a_killed_one_continues_with_its_part(small: World, copy: World) -> None:
    (copy.root / MANIFEST).unlink()
    shutil.rmtree(copy.model(copy.tasks[-1]))
    shutil.rmtree(copy.root / "data" / copy.tasks[-1])
    copy.line.unlink()
    draft = copy.root / f".part-models-{copy.tasks[-1]}"
    draft.mkdir()
    (draft / "config.json").write_text("{")
    kept = (copy.base / "model.safetensors").stat()
    make_world(copy.root, "small")
    assert (copy.base / "model.safetensors").stat().st_mtime_ns == kept.st_mtime_ns
    assert files(copy) == files(small)


def test_a_made_world_is_not_made_again(small: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "build", None)
    assert make_world(small.root, "small") == small


@pytest.mark.parametrize("change", ["seed", "code", "damage", "missing"])
def test_stale_and_damaged_worlds_are_made_again(
    copy: World, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = copy.base / "model.safetensors"
    if change == "code":
        monkeypatch.setattr(make, "SOURCES", make.SOURCES[1:])
    elif change == "damage":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif change == "missing":
        weights.unlink()
    seen = []

    def build(root: Path, size: str, seed: int, progress: object) -> dict[str, dict[str, float]]:
        seen.append(sorted(p.name for p in root.iterdir()))
        (root / "line.yaml").write_text(f"{size} {seed}")
        return {"general": {"base": 0.5}}

    monkeypatch.setattr(building, "build", build)
    made = make_world(copy.root, "small", seed=1 if change == "seed" else 0)
    assert seen == [[LOCK]], "nothing of the old world may be left"
    assert made.line.read_text() == f"small {1 if change == 'seed' else 0}"


def test_another_folder_is_refused_and_left_unchanged(tmp_path: Path) -> None:
    precious = tmp_path / "base"
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine")
    with pytest.raises(BadInput, match="is not a world"):
        make_world(tmp_path, "small")
    assert [p.name for p in tmp_path.rglob("*")] == ["base", "thesis.txt"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(BadInput):
        make_world(tmp_path / "out", "small")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_full_disk_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(building, "build", build)
    with pytest.raises(Unavailable, match="No space left"):
        make_world(tmp_path / "out", "small")
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_an_unknown_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="small or demo"):
        make_world(tmp_path, "huge")


def test_progress_rises_to_its_total(copy: World) -> None:
    (copy.root / MANIFEST).unlink()
    shutil.rmtree(copy.model(copy.tasks[0]))
    reports: list[tuple[int, int]] = []
    make_world(copy.root, "small", progress=lambda done, total: reports.append((done, total)))
    done, totals = zip(*reports, strict=True)
    assert list(done) == sorted(done)
    assert set(totals) == {done[-1]}


def test_only_the_vision_blocks_are_finetuned(small: World) -> None:
    base = load_file(small.base / "model.safetensors")
    for task in small.tasks:
        tuned = load_file(small.model(task) / "model.safetensors")
        changed = {name for name in base if not torch.equal(base[name], tuned[name])}
        assert changed
        assert all(name.startswith("vision_model.encoder.layers.") for name in changed)
        assert Clip().config_differences(small.base, small.model(task)) == []


def test_restitch_reads_the_files(small: World) -> None:
    line = load_line(small.line)
    assert line.base == str(small.base)
    assert line.family == "clip"
    assert line.localize.density == building.DENSITY
    assert isinstance(line.retention, TaskSpec)
    assert load_task(small.retention) == line.retention
    assert small.tasks == tuple(skill.name for skill in TASKS)
    for task in small.tasks:
        assert load_task(small.task_file(task)).task == task


@pytest.mark.parametrize("skill", [GENERAL, *TASKS], ids=lambda skill: skill.name)
def test_restitch_sees_the_rows_pixels_and_heads_that_training_saw(
    small: World, skill: Skill
) -> None:
    spec = load_task(small.retention if skill is GENERAL else small.task_file(skill.name))
    assert spec.data is not None
    assert spec.head is not None
    assert not isinstance(spec.head.labels, str)
    data = DataSpec(**spec.data.model_dump(exclude={"content", "sample"}))
    rows = TaskData(data, skill.labels, "image")
    family = Clip()
    builder = Builder(small.root, SIZES["small"], 0, lambda _done, _total: None)
    splits: Sequence[str] = ("test",) if skill is GENERAL else ("train", "validation", "test")
    assert rows.splits == tuple(splits)
    for split in splits:
        pictures, labels = builder.rows(skill, split)
        batch = family.preprocessor(small.base)(list(examples(rows, split)))
        assert np.array_equal(batch["labels"].numpy(), labels)
        torch.testing.assert_close(batch["pixel_values"], pixels(pictures), atol=1e-6, rtol=0)
    model = family.load(small.base)
    head = family.build_head(
        model, small.base, HeadSpec(labels=skill.labels, templates=skill.templates)
    )
    with one_thread():
        ours = zero_shot_head(builder.load(small.base), builder.tokenizer, skill)
    torch.testing.assert_close(head.tensors["weight"], ours, atol=1e-5, rtol=0)


def examples(data: TaskData, split: str) -> list[Example]:
    rows = data.rows(split)
    return [rows[position] for position in range(len(rows))]


def test_the_manifest_holds_the_accuracy_of_the_models(small: World) -> None:
    manifest = json.loads((small.root / MANIFEST).read_text())
    assert manifest["accuracy"] == small.accuracy
    assert set(small.accuracy["general"]) == {"base"}
    for task in small.tasks:
        assert set(small.accuracy[task]) == {"base", "finetuned"}
