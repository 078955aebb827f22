"""Finetuned models that differ from the base: in dtype, in tensors, outside of masks."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from restitch.merging.files.sparse import SparseFile
from restitch.merging.rules.stitch import write_patch
from restitch.modeling.families.family import get_family
from restitch.registry.ledger.finetuned_models import Addition
from tests.conftest import NewHome
from tests.shell import Shell
from tests.tiny_models import tiny_siglip, tweaked, vision_tower
from tests.worlds import World, copied, write_yaml
from tests.worlds import clip_world as clip_world_of

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


def test_versions_of_before_have_no_packed_values_and_are_rebuilt_and_repaired(
    world: World, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = copied(world.base, tmp_path / "base", in_dtype(torch.bfloat16))
    shell("init", world.line(tmp_path / "line.yaml", base=str(base), retention=None))
    with monkeypatch.context() as before:
        before.setattr(
            "restitch.tasks.merge.write_patch",
            lambda *arguments, **keywords: write_patch(*arguments, **{**keywords, "packed": False}),
        )
        shell.add(world, "colour")
    shell.add(world, "number")
    blobs = [
        shell.home / "store" / "blobs" / shell.ledger().merged(number).patch for number in (1, 2)
    ]
    assert [SparseFile.open(blob).format for blob in blobs] == ["1", "4"]
    assert shell.json("verify", "demo")["rebuilt"] == [1, 2]
    stored = [blob.read_bytes() for blob in blobs]
    for blob in blobs:
        blob.unlink()
    shell("verify", "demo", "--repair")
    assert [blob.read_bytes() for blob in blobs] == stored


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
        assert record["retention"]["base"] == 1.0
        patches.append(contents(shell, tmp_path / f"out{prefix}"))
    whole = new_home("whole")
    whole("init", clip_world.line(tmp_path / "line.yaml"))
    whole.add(clip_world, "colour")
    patches.append(contents(whole, tmp_path / "out-whole"))
    assert patches[0] == patches[1] == patches[2]


def test_a_clip_line_registers_merges_and_exports(
    clip_world: World, new_home: NewHome, tmp_path: Path
) -> None:
    from transformers import AutoImageProcessor, CLIPModel

    shell = new_home("home")
    shell("init", clip_world.line(tmp_path / "line.yaml"))
    for task in ("colour", "number"):
        found = shell.add(clip_world, task)
    record = found["merged"]["record"]
    assert set(record["results"]) == {"colour", "number"}
    kept = record["retention"]
    assert (kept["base"], kept["count"]) == (1.0, 60)
    assert kept["base_more"]["top5"] is not None
    shell("export", "demo", "champion", tmp_path / "out")
    CLIPModel.from_pretrained(tmp_path / "out")
    AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil")
    merged, base = (load_file(folder / WEIGHTS) for folder in (tmp_path / "out", clip_world.base))
    touched = {name for name in merged if not torch.equal(merged[name], base[name])}
    assert touched
    assert all(name.startswith("vision_model.encoder.layers.") for name in touched)


@pytest.mark.parametrize("naflex", [False, True], ids=["siglip", "siglip2"])
def test_a_siglip_line_takes_whole_models_and_towers_and_exports(
    new_home: NewHome, tmp_path: Path, naflex: bool
) -> None:
    from transformers import AutoModel

    world = clip_world_of(tmp_path / "world", partial(tiny_siglip, naflex=naflex), 0.3)
    shell = new_home("home")
    shell("init", world.line(tmp_path / "line.yaml"))
    assert shell.add(world, "colour")["state"] == "ready"
    tower = vision_tower(world.model("number"), tmp_path / "tower")
    files = ("--task", world.task("number"), "--model", tower)
    record = shell.json("register", "demo", *files)["merged"]["record"]
    assert set(record["results"]) == {"colour", "number"}
    assert all(result["finetuned"] == 1.0 for result in record["results"].values())
    assert record["retention"]["base"] == 1.0
    shell("export", "demo", "champion", tmp_path / "out")
    assert AutoModel.from_pretrained(tmp_path / "out").logit_bias == -3.0
    merged, base = (load_file(folder / WEIGHTS) for folder in (tmp_path / "out", world.base))
    touched = {name for name in merged if not torch.equal(merged[name], base[name])}
    assert touched
    assert all(name.startswith("vision_model.encoder.layers.") for name in touched)
    shell("verify", "demo")


def outside(world: World, folder: Path, size: float) -> Path:
    return tweaked(
        world.model("colour"), folder, seed=5, size=size, globs=("embeddings.word_embeddings.*",)
    )


def test_a_large_change_outside_of_masks_is_measured_and_warned_of(
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


def test_a_small_change_outside_of_masks_is_recorded_without_a_warning(
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

    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    model = outside(world, tmp_path / "model", 0.5)
    monkeypatch.setattr("restitch.flows.onboard.OUTSIDE_WARNING", 1.0)
    files = ("--task", world.task("colour"), "--model", model)
    done = shell("register", "demo", *files, "--json")
    results = done.json["facts"]["results"]
    value, whole = results["localizable"]["value"], results["finetuned"]
    assert not whole["low"] <= value <= whole["high"]
    told = " ".join(done.err.split())
    assert f"the accuracy is {value:.3f}, not {whole['value']:.3f}" in told
    assert "addition" not in done.json["facts"], "the finetuned model is not better with them"


def test_a_skill_in_other_tensors_gives_a_measured_proposal_where_people_look(
    world: World, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line merges one of two layers that finetuning changed."""
    monkeypatch.setattr(get_family("text-encoder"), "localizable", ("encoder.layer.0.*",))
    everything = {"density": 1.0}
    shell("init", world.line(tmp_path / "line.yaml", retention=None, localize=everything))
    files = ("--task", world.task("colour"), "--model", world.model("colour"))
    done = shell("register", "demo", *files)
    facts = shell.state().tasks["colour"].versions[1].facts
    value, whole = facts.results["localizable"].value, facts.results["finetuned"].value
    assert facts.addition == Addition(include=("encoder.*",), value=whole)
    assert value < 0.9 * whole
    key = '`localize: {include: ["encoder.*"]}` in the line file'
    assert f"the accuracy is {value:.3f}, not {whole:.3f}; with {key}" in " ".join(done.err.split())
    sentence = (
        "some of the skill lies in tensors that the line does not merge: all weights that it can"
        f" merge have {value:.3f}; with {key} the accuracy of all weights that can be merged is"
        f" {whole:.3f}"
    )
    assert done.out.count(sentence) == 1
    for command in (("show", "demo", "1"), ("status", "demo")):
        assert f"mostly because {sentence}" in shell(*command).out
    page = tmp_path / "report.html"
    shell("report", "demo", "1", page)
    assert f"mostly because {sentence}".replace('"', "&#34;") in page.read_text()
    (note,) = shell.json("status", "demo")["lines"][0]["models"][0]["notes"]
    assert sentence in note

    wider = {**everything, "include": ["encoder.*"]}
    shell("init", world.line(tmp_path / "line.yaml", retention=None, localize=wider))
    result = shell.json("remerge", "demo")["record"]["results"]["colour"]
    assert (result["normalized"], result["notes"]) == (1.0, [])
    assert shell.state().tasks["colour"].versions[1].facts.addition is None


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


def with_train(world: World, folder: Path, **data: Any) -> Path:
    """The task `colour` with train rows alone."""
    values = yaml.safe_load(world.task("colour").read_text())
    rows = (world.root / "data" / "colour" / "test.jsonl").read_text()
    (folder / "rows").mkdir()
    (folder / "rows" / "train.jsonl").write_text(rows)
    columns = {"input": "text", "label": "label"}
    values["data"] = {"path": "rows", "train": "train.jsonl", **columns, **data}
    return write_yaml(folder / "colour.yaml", values)


def test_without_validation_rows_a_part_of_train_is_used_and_recorded(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    files = ("--task", with_train(world, tmp_path), "--model", world.model("colour"))
    record = shell.json("register", "demo", *files)["merged"]["record"]
    result = record["results"]["colour"]
    assert result["split"] == "validation"
    assert 0 < result["count"] <= 12, "a fifth of 60"
    assert [note for note in result["notes"] if "may have seen" in note]


def test_a_trained_mask_is_the_same_bytes_again(
    world: World, new_home: NewHome, tmp_path: Path
) -> None:
    task = with_train(world, tmp_path)
    localize = {"mode": "trained", "density": 0.2, "epochs": 2}
    deltas = []
    for name in ("one", "two"):
        shell = new_home(name)
        shell("init", world.line(tmp_path / "line.yaml", retention=None, localize=localize))
        files = ("--task", task, "--model", world.model("colour"))
        found = shell.json("register", "demo", *files)
        assert found["facts"]["localizer"].startswith("trained/")
        assert found["facts"]["density"] == pytest.approx(0.2, abs=1e-3)
        deltas.append(shell.state().tasks["colour"].versions[1].delta)
        assert shell.json("evaluate", "demo")["results"] == found["merged"]["record"]["results"]
    assert deltas[0] == deltas[1]


def test_a_trained_line_localizes_without_data_if_a_task_has_no_rows(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    localize = {"mode": "trained", "density": 0.2}
    shell("init", world.line(tmp_path / "line.yaml", retention=None, localize=localize))
    files = ("--task", world.task("colour"), "--model", world.model("colour"))
    done = shell("register", "demo", *files, "--json")
    assert done.json["facts"]["localizer"].startswith("dataless/")
    assert "no train rows" in done.err


def test_retention_may_be_a_task_of_the_line(world: World, shell: Shell, tmp_path: Path) -> None:
    shell("init", world.line(tmp_path / "line.yaml", retention="number"))
    assert shell.add(world, "colour")["merged"]["record"]["retention"] is None
    kept = shell.add(world, "number")["merged"]["record"]["retention"]
    assert (kept["task"], kept["count"]) == ("number", 60)
    assert kept["ratio"] == kept["value"] / kept["base"]


def test_f1_is_measured_where_a_task_asks_for_it(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    values = {**yaml.safe_load(world.task("number").read_text()), "metric": "f1"}
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    task = write_yaml(tmp_path / "number.yaml", values)
    files = ("--task", task, "--model", world.model("number"))
    result = shell.json("register", "demo", *files)["merged"]["record"]["results"]["number"]
    assert (result["metric"], result["finetuned"]) == ("f1", 1.0)


def test_the_classes_may_come_from_the_data(
    clip_world: World, new_home: NewHome, tmp_path: Path
) -> None:
    shell = new_home("home")
    shell("init", clip_world.line(tmp_path / "line.yaml", retention=None))
    values = yaml.safe_load(clip_world.task("colour").read_text())
    values["head"] = {"labels_from": "dataset", "templates": values["head"]["templates"]}
    task = write_yaml(tmp_path / "colour.yaml", values)
    files = ("--task", task, "--model", clip_world.model("colour"))
    shell("register", "demo", *files)
    spec = shell.state().tasks["colour"].spec
    assert spec.head is not None
    folders = sorted(p.name for p in (clip_world.root / "data" / "colour" / "test").iterdir())
    assert spec.head.labels == tuple(folders)
    assert shell.json("register", "demo", *files)["already"] is True


def test_a_model_may_come_from_mlflow(world: World, shell: Shell, tmp_path: Path) -> None:
    from restitch.registry.home import Home
    from restitch.registry.mlflow.connection import connect

    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    client = connect(Home(shell.home))
    location = (tmp_path / "artifacts").as_uri()
    experiment = client.create_experiment("training", artifact_location=location)
    run = client.create_run(experiment).info.run_id
    client.log_artifacts(run, str(world.model("colour")), "model")
    files = ("--task", world.task("colour"), "--model", f"runs:/{run}/model")
    assert shell.json("register", "demo", *files)["state"] == "ready"
    shutil.rmtree(tmp_path / "artifacts")
    shutil.rmtree(shell.home / "cache")
    assert shell.json("register", "demo", *files)["already"] is True, "kept in the store"
    assert shell.json("remerge", "demo", "--force")["action"] == "unchanged"


def test_a_line_that_asks_for_a_device_waits_for_a_worker_that_has_it(
    world: World, new_home: NewHome, tmp_path: Path
) -> None:
    home = new_home("home").home
    shell = Shell(home, {"RESTITCH_DEVICE": "cpu"})
    shell("init", world.line(tmp_path / "line.yaml", retention=None, require_device="cuda"))
    files = ("--task", world.task("colour"), "--model", world.model("colour"))
    done = shell("register", "demo", *files, code=6)
    assert "requires the device cuda" in done.err
    assert shell.state().tasks["colour"].versions[1].state == "registered"
    done = Shell(home, {"RESTITCH_DEVICE": "gpu"})("remerge", "demo", code=3)
    assert "'gpu'" in done.err
