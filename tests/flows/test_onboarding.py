"""What finetuned models may look like: other number types, parts of a model, changes elsewhere."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import NewHome
from tests.shell import Shell
from tests.tiny_models import tweaked, vision_tower
from tests.worlds import World, copied, write_yaml

pytestmark = pytest.mark.usefixtures("without_mlflow")
WEIGHTS = "model.safetensors"


def in_dtype(dtype: torch.dtype) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = {k: v.to(dtype) for k, v in load_file(folder / WEIGHTS).items()}
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config["dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config))

    return change


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_model_in_half_precision_joins_a_base_in_full(
    world: World, shell: Shell, tmp_path: Path, dtype: torch.dtype
) -> None:
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    model = copied(world.model("colour"), tmp_path / "model", in_dtype(dtype))
    found = shell.json("register", "demo", "--task", world.task("colour"), "--model", model)
    assert found["state"] == "ready"
    assert found["merged"]["record"]["results"]["colour"]["finetuned"] > 0.9
    shell("export", "demo", "champion", tmp_path / "out")
    merged, base, tuned = (
        load_file(folder / WEIGHTS) for folder in (tmp_path / "out", world.base, model)
    )
    changed = 0
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float32
        other = tensor != base[name]
        assert torch.equal(tensor[other], tuned[name][other].float()), "the finetuned values"
        changed += int(other.sum())
    assert changed == found["merged"]["record"]["kept"] == found["facts"]["kept"] == 1334


def test_a_model_in_full_precision_joins_a_base_in_half(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    base = copied(world.base, tmp_path / "base", in_dtype(torch.bfloat16))
    shell("init", world.line(tmp_path / "line.yaml", base=str(base), retention=None))
    shell.add(world, "colour")
    shell.add(world, "number")
    shell("export", "demo", "champion", tmp_path / "out")
    merged, first, second = (
        load_file(folder / WEIGHTS)
        for folder in (tmp_path / "out", world.model("colour"), world.model("number"))
    )
    kept, both = load_file(base / WEIGHTS), 0
    for name, tensor in merged.items():
        assert tensor.dtype == torch.bfloat16
        mean = ((first[name].double() + second[name].double()) / 2).to(torch.bfloat16)
        allowed = [kept[name], first[name].bfloat16(), second[name].bfloat16(), mean]
        assert torch.stack([tensor == one for one in allowed]).any(0).all(), name
        both += int((tensor == mean).sum())
    assert both > 0


def contents(shell: Shell, out: Path) -> bytes:
    shell("export", "demo", "champion", out)
    return (out / WEIGHTS).read_bytes()


def test_a_vision_tower_joins_a_whole_clip(
    clip_world: World, new_home: NewHome, tmp_path: Path
) -> None:
    """As version 5 of transformers saves it, and as version 4 did."""
    patches = []
    for prefix in ("", "vision_model."):
        shell = new_home(f"home-{prefix}")
        shell("init", clip_world.line(tmp_path / "line.yaml"))
        tower = vision_tower(clip_world.model("colour"), tmp_path / f"tower{prefix}", prefix=prefix)
        files = ("--task", clip_world.task("colour"), "--model", tower)
        found = shell.json("register", "demo", *files)
        record = found["merged"]["record"]
        assert record["results"]["colour"]["finetuned"] == 1.0
        assert record["retention"]["base_top1"] == 1.0
        patches.append(contents(shell, tmp_path / f"out{prefix}"))
    whole = new_home("whole")
    whole("init", clip_world.line(tmp_path / "line.yaml"))
    whole.add(clip_world, "colour")
    patches.append(contents(whole, tmp_path / "out-whole"))
    assert patches[0] == patches[1] == patches[2]


def test_a_clip_line_goes_all_the_way(clip_world: World, new_home: NewHome, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, CLIPModel

    shell = new_home("home")
    shell("init", clip_world.line(tmp_path / "line.yaml"))
    for task in ("colour", "number"):
        found = shell.add(clip_world, task)
    record = found["merged"]["record"]
    assert set(record["results"]) == {"colour", "number"}
    kept = record["retention"]
    assert (kept["base_top1"], kept["count"]) == (1.0, 60)
    assert kept["base_top5"] is not None
    shell("export", "demo", "champion", tmp_path / "out")
    CLIPModel.from_pretrained(tmp_path / "out")
    AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil")
    merged, base = (load_file(folder / WEIGHTS) for folder in (tmp_path / "out", clip_world.base))
    touched = {name for name in merged if not torch.equal(merged[name], base[name])}
    assert touched
    assert all(name.startswith("vision_model.encoder.layers.") for name in touched)


def outside(world: World, folder: Path, size: float) -> Path:
    return tweaked(
        world.model("colour"), folder, seed=5, size=size, globs=("embeddings.word_embeddings.*",)
    )


def test_what_lies_outside_of_masks_is_measured_and_said(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    model = outside(world, tmp_path / "model", 0.5)
    files = ("--task", world.task("colour"), "--model", model)
    done = shell("register", "demo", *files, "--json")
    facts = done.json["facts"]
    assert facts["outside_share"] > 0.1
    assert facts["outside_tensors"][0][0] == "embeddings.word_embeddings.weight"
    told = " ".join(done.err.split())
    assert f"{facts['outside_share']:.1%}" in told
    assert "embeddings.word_embeddings.weight" in told
    results = facts["results"]
    assert f"{results['localizable']['value']:.3f}" in told


def test_a_little_outside_of_masks_is_recorded_and_not_warned_of(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    model = outside(world, tmp_path / "model", 0.001)
    task = write_yaml(tmp_path / "bare.yaml", {"task": "bare"})
    done = shell("register", "demo", "--task", task, "--model", model, "--json")
    assert 0 < done.json["facts"]["outside_share"] < 0.1
    assert "warning" not in done.err


def test_a_loss_outside_of_masks_is_warned_of_by_accuracy(
    world: World, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small share of the norm may still be what the task lives on."""
    import flows.onboard

    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    model = outside(world, tmp_path / "model", 0.5)
    monkeypatch.setattr(flows.onboard, "OUTSIDE_WARNING", 1.0)
    files = ("--task", world.task("colour"), "--model", model)
    done = shell("register", "demo", *files, "--json")
    results = done.json["facts"]["results"]
    value, whole = results["localizable"]["value"], results["finetuned"]
    assert not whole["low"] <= value <= whole["high"]
    assert f"it has {value:.3f} instead of {whole['value']:.3f}" in " ".join(done.err.split())


def test_another_choice_of_tensors_is_localized(world: World, shell: Shell, tmp_path: Path) -> None:
    localize = {"density": 0.3, "include": ["embeddings.*"], "exclude": ["*LayerNorm*"]}
    found = shell.json("init", world.line(tmp_path / "line.yaml", localize=localize))
    base = load_file(world.base / WEIGHTS)
    names = [
        n
        for n in base
        if ("encoder.layer." in n or n.startswith("embeddings.")) and "LayerNorm" not in n
    ]
    assert found["localizable"] == {
        "tensors": len(names),
        "coordinates": sum(base[n].numel() for n in names),
    }
    facts: dict[str, Any] = shell.add(world, "colour")["facts"]
    assert facts["coordinates"] == found["localizable"]["coordinates"]


def test_a_single_file_joins(world: World, shell: Shell, tmp_path: Path) -> None:
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    files = ("--task", world.task("colour"), "--model", world.model("colour") / WEIGHTS)
    assert shell.json("register", "demo", *files)["state"] == "ready"


def test_a_model_that_vanishes_after_it_joined_does_not_stop_the_line(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    """All that a merge needs of a finetuned model is its sparse delta."""
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    model = copied(world.model("colour"), tmp_path / "model")
    shell("register", "demo", "--task", world.task("colour"), "--model", model)
    shutil.rmtree(model)
    record = shell.add(world, "number")["merged"]["record"]
    assert record["results"]["colour"]["finetuned"] == 1.0, "from the store"
    shell("export", "demo", "champion", tmp_path / "out")
