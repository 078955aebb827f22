"""Every tensor and every file of a finetuned model is used, reported, or a reason to refuse it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from restitch.registry.home import Home
from restitch.registry.ledger.finetuned_models import PREPROCESSING
from restitch.registry.mlflow.connection import connect
from tests.conftest import NewHome
from tests.shell import Shell
from tests.worlds import World, copied, write_yaml

WEIGHTS = "model.safetensors"
BLOCK = "encoder.layer.0.attention.self.query.weight"
without_mlflow = pytest.mark.usefixtures("without_mlflow")


def with_tensors(folder: Path, target: Path, **changes: Tensor | None) -> Path:
    """A copy of a model with more tensors; None removes one."""
    tensors = {**load_file(folder / WEIGHTS), **changes}
    copied(folder, target)
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file(kept, target / WEIGHTS, {"format": "pt"})
    return target


def prefixed(folder: Path, target: Path, prefix: str) -> Path:
    """A copy of a model with a prefix before all names."""
    copied(folder, target)
    tensors = {f"{prefix}{name}": value for name, value in load_file(folder / WEIGHTS).items()}
    save_file(tensors, target / WEIGHTS, {"format": "pt"})
    return target


@pytest.fixture
def line(world: World, shell: Shell, tmp_path: Path) -> Shell:
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    return shell


CLASSIFIER = {"classifier.weight": torch.ones(3, 16), "classifier.bias": torch.ones(3)}


@without_mlflow
def test_tensors_that_the_base_lacks_are_reported_wherever_the_model_is_shown(
    world: World, line: Shell, tmp_path: Path
) -> None:
    pooler = {"pooler.dense.weight": None, "pooler.dense.bias": None}
    model = with_tensors(world.model("colour"), tmp_path / "model", **CLASSIFIER, **pooler)
    total = sum(value.numel() for value in load_file(model / WEIGHTS).values())
    files = ("--task", world.task("colour"), "--model", model)
    done = line("register", "demo", *files)
    left = "not used: 2 tensors (51 weights, "
    names = "classifier.bias, classifier.weight"
    assert left in done.out
    assert names in done.out
    assert "taken from the base: 2 tensors (272 weights, " in done.out
    facts = line.json("register", "demo", *files)["facts"]
    assert facts["unused"] == {
        "count": 2,
        "weights": 51,
        "share": 51 / total,
        "names": names.split(", "),
    }
    assert facts["from_base"]["names"] == ["pooler.dense.bias", "pooler.dense.weight"]
    shown = line("show", "demo", "champion").out
    assert f"colour: {left}" in shown
    assert names in shown
    line("export", "demo", "champion", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| colour | not used | 2 (51 weights, " in card
    assert "classifier.bias, classifier.weight |" in card
    assert "| colour | taken from the base | 2 (272 weights, " in card


@without_mlflow
def test_a_model_with_the_base_s_tensors_alone_has_nothing_to_report(
    world: World, line: Shell, tmp_path: Path
) -> None:
    done = line(
        "register", "demo", "--task", world.task("colour"), "--model", world.model("colour")
    )
    facts = line.json("status", "demo")
    assert "not used" not in done.out + line("show", "demo", "champion").out
    assert "note" not in done.out
    assert facts["lines"]
    line("export", "demo", "champion", tmp_path / "out")
    assert "not used" not in (tmp_path / "out" / "README.md").read_text()


@without_mlflow
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "net.bert."])
def test_a_wrapped_model_gives_the_same_merged_weights(
    world: World, new_home: NewHome, tmp_path: Path, prefix: str
) -> None:
    merged = []
    for name, model in (
        ("plain", world.model("colour")),
        ("wrapped", prefixed(world.model("colour"), tmp_path / "model", prefix)),
    ):
        shell = new_home(name)
        shell("init", world.line(tmp_path / "line.yaml", retention=None))
        files = ("--task", world.task("colour"), "--model", model)
        done = shell("register", "demo", *files)
        shell("export", "demo", "champion", tmp_path / f"out-{name}")
        merged.append((tmp_path / f"out-{name}" / WEIGHTS).read_bytes())
    assert merged[0] == merged[1]
    assert f"such as {prefix}" in done.out


@without_mlflow
def test_other_names_are_refused_with_both_sides_shown(
    world: World, line: Shell, tmp_path: Path
) -> None:
    tensors = {
        name.replace("encoder.layer.", "stack.block."): value
        for name, value in load_file(world.model("colour") / WEIGHTS).items()
    }
    model = copied(world.model("colour"), tmp_path / "model")
    save_file(tensors, model / WEIGHTS, {"format": "pt"})
    files = ("--task", world.task("colour"), "--model", model)
    reason = line.json("register", "demo", *files, code=4)["reason"]
    assert "encoder.layer.0." in reason
    assert "stack.block." in reason
    assert "- and " in reason
    assert len(reason.splitlines()) < 12


@without_mlflow
def test_unexpected_tensors_in_a_localizable_layer_are_refused(
    world: World, line: Shell, tmp_path: Path
) -> None:
    extra = "encoder.layer.1.adapter.down.weight"
    model = with_tensors(world.model("colour"), tmp_path / "model", **{extra: torch.ones(2, 16)})
    files = ("--task", world.task("colour"), "--model", model)
    reason = line.json("register", "demo", *files, code=4)["reason"]
    assert f"unexpected in a localizable layer: {extra}: F32 [2, 16]" in reason


def lower_case(folder: Path) -> None:
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    values["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(values))


@without_mlflow
def test_another_tokenizer_needs_a_decision_that_is_recorded(
    world: World, line: Shell, tmp_path: Path
) -> None:
    model = copied(world.model("colour"), tmp_path / "model", lower_case)
    files = ("--task", world.task("colour"), "--model", model)
    found = line.json("register", "demo", *files, code=4)
    assert "tokenizer normalizer.type: base None, finetuned 'Lowercase'" in found["reason"]
    assert "--accept-preprocessing --reason WHY" in found["reason"]
    done = line("register", "demo", *files, "--accept-preprocessing", code=2)
    assert "--reason" in done.err
    accept = ("--accept-preprocessing", "--reason", "the texts are lower case anyway")
    found = line.json("register", "demo", *files, *accept)
    assert (found["version"], found["state"], found["already"]) == (1, "ready", True)
    (note,) = found["facts"]["notes"]
    assert note.startswith("accepted at registration: tokenizer normalizer.type")
    acts = [act for act in line.acts() if act.kind == "registered"]
    assert "the texts are lower case anyway" in acts[-1].reason
    accepted = line.state().tasks["colour"].versions[1].facts.accepted
    assert accepted[PREPROCESSING].reason == "the texts are lower case anyway"
    assert "accepted at registration" in line("show", "demo", "champion").out
    line("register", "demo", *files)  # the decision stays
    assert line.state().tasks["colour"].versions[1].state == "ready"


@without_mlflow
def test_a_new_model_can_be_accepted_at_once(world: World, line: Shell, tmp_path: Path) -> None:
    model = copied(world.model("colour"), tmp_path / "model", lower_case)
    files = ("--task", world.task("colour"), "--model", model)
    accept = ("--accept-preprocessing", "--reason", "checked by hand")
    assert line.json("register", "demo", *files, *accept)["state"] == "ready"


@without_mlflow
def test_another_image_processor_is_quarantined(
    clip_world: World, new_home: NewHome, tmp_path: Path
) -> None:
    def other(folder: Path) -> None:
        file = folder / "preprocessor_config.json"
        values = json.loads(file.read_text())
        values |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        file.write_text(json.dumps(values))

    shell = new_home("home")
    shell("init", clip_world.line(tmp_path / "line.yaml", retention=None))
    model = copied(clip_world.model("colour"), tmp_path / "model", other)
    files = ("--task", clip_world.task("colour"), "--model", model)
    reason = shell.json("register", "demo", *files, code=4)["reason"]
    assert "image processor image_mean" in reason
    assert "image processor image_std" in reason


@without_mlflow
def test_what_was_inferred_is_noted(world: World, line: Shell, tmp_path: Path) -> None:
    def changed(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["unsloth_version"] = "2026.1.4"
        (folder / "config.json").write_text(json.dumps(config))
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        for number in (1, 2):
            part = {name: tensors[name] for name in sorted(tensors)[number - 1 :: 2]}
            save_file(part, folder / f"model-0000{number}-of-00002.safetensors")
        (folder / "modules.json").write_text('[{"type": "models.Dense"}]')
        (folder / "pytorch_model.bin").write_bytes(b"\x80")
        (folder / "tokenizer.json").unlink()

    model = copied(world.model("colour"), tmp_path / "model", changed)
    files = ("--task", world.task("colour"), "--model", model)
    notes = line.json("register", "demo", *files)["facts"]["notes"]
    text = "\n".join(notes)
    for part in (
        "no index",
        "not read: pytorch_model.bin",
        "unsloth_version",
        "no tokenizer",
        "Dense",
    ):
        assert part in text
    shown = line("show", "demo", "champion").out
    assert all(f"colour: note: {note}" in shown for note in notes)


@without_mlflow
def test_a_base_that_cannot_be_merged_is_refused(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    def fp8(folder: Path) -> None:
        tensors = {
            name: value.to(torch.float8_e4m3fn) if value.ndim == 2 else value
            for name, value in load_file(folder / WEIGHTS).items()
        }
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    base = copied(world.base, tmp_path / "base", fp8)
    done = shell("init", world.line(tmp_path / "line.yaml", base=str(base)), code=3)
    assert "holds quantized tensors" in done.err
    assert "F8_E4M3" in done.err
    odd = {"encoder.layer.0.filter": torch.zeros(2, dtype=torch.complex64)}
    mixed = with_tensors(world.base, tmp_path / "mixed", **odd)
    done = shell("init", world.line(tmp_path / "line.yaml", base=str(mixed)), code=3)
    assert "encoder.layer.0.filter: C64 [2]" in done.err
    wrapped = prefixed(world.base, tmp_path / "wrapped", "_orig_mod.")
    done = shell("init", world.line(tmp_path / "line.yaml", base=str(wrapped)), code=3)
    assert "_orig_mod." in done.err
    assert shell.head_bytes() is None


def test_nothing_is_left_of_a_refused_model_of_mlflow(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    """No object in the store, no entry in the ledger, no model in MLflow."""
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    client = connect(Home(shell.home))
    experiment = client.create_experiment("training", (tmp_path / "artifacts").as_uri())
    run = client.create_run(experiment).info.run_id
    tensors = {"encoder.layer.0.attention.self.query.lora_A.weight": torch.ones(2, 16)}
    model = with_tensors(world.model("colour"), tmp_path / "model", **tensors)
    client.log_artifacts(run, str(model), "model")
    store = shell.home / "store"

    def everything() -> tuple[set[Path], set[str]]:
        files = {file.relative_to(store) for file in store.rglob("*") if file.is_file()}
        return files, {each.name for each in client.search_registered_models()}

    before = everything()
    files = ("--task", world.task("colour"), "--model", f"runs:/{run}/model")
    done = shell("register", "demo", *files, code=3)
    assert "factors of an adapter" in done.err
    assert everything() == before
    shutil.rmtree(model)
    names = ("one.safetensors", "two.safetensors")
    (tmp_path / "two").mkdir()
    for name in names:
        save_file({"a": torch.ones(1)}, tmp_path / "two" / name)
    client.log_artifacts(run, str(tmp_path / "two"), "two")
    done = shell("register", "demo", *files[:3], f"runs:/{run}/two", code=3)
    assert f"runs:/{run}/two contains several checkpoints" in done.err
    assert everything() == before


@without_mlflow
def test_nothing_is_left_of_a_registration_with_a_bad_task(
    world: World, line: Shell, tmp_path: Path
) -> None:
    task = write_yaml(
        tmp_path / "bad.yaml",
        {
            "task": "bad",
            "data": {"path": str(world.root / "data" / "colour"), "test": "test.jsonl"},
            "head": {"labels": ["no", "yes"]},
        },
    )
    store = line.home / "store"
    before = {file for file in store.rglob("*") if file.is_file()}
    line("register", "demo", "--task", task, "--model", world.model("colour"), "--copy", code=3)
    assert {file for file in store.rglob("*") if file.is_file()} == before
