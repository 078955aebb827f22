"""An adapter is registered like a whole model, and gives the same masks and merged weights."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification

from restitch.merging.adapters.checkpoint import AdapterCheckpoint
from restitch.merging.files.checkpoint import Checkpoint
from restitch.registry.home import Home
from restitch.registry.mlflow.connection import connect
from tests.conftest import NewHome
from tests.merging.adapters.folders import write_adapter
from tests.merging.adapters.peft_folders import adapter_on, merged_by_peft
from tests.shell import Shell
from tests.tiny_models import tiny_bert
from tests.worlds import World, write_yaml

WEIGHTS = "model.safetensors"
MODULES = [
    f"encoder.layer.{layer}.{name}"
    for layer in (0, 1)
    for name in ("attention.self.query", "attention.output.dense")
]
ACCEPT = ("--accept-no-gain", "--reason", "a test")
without_mlflow = pytest.mark.usefixtures("without_mlflow")


def factors(seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_{part}.weight": 0.3 * torch.randn(shape, generator=random)
        for module in MODULES
        for part, shape in (("A", (2, 16)), ("B", (16, 2)))
    }


def whole(base: Path, adapter: Path, folder: Path) -> Path:
    """The folder of the whole model that an adapter describes."""
    shutil.copytree(base, folder)
    checkpoint = AdapterCheckpoint.read(adapter, Checkpoint.open(base))
    tensors = {name: checkpoint.tensor(name).clone() for name in checkpoint.names}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


@pytest.fixture
def adapter(world: World, tmp_path: Path) -> Path:
    return write_adapter(
        tmp_path / "adapter", factors(), base_model_name_or_path=str(world.base), lora_alpha=3
    )


@pytest.fixture
def line(world: World, shell: Shell, tmp_path: Path) -> Shell:
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    return shell


def everything(shell: Shell) -> set[Path]:
    store = shell.home / "store"
    return {file.relative_to(store) for file in store.rglob("*") if file.is_file()}


@without_mlflow
@pytest.mark.parametrize(
    ("method", "density"), [("localize-and-stitch", 0.3), ("task-arithmetic", 1.0)]
)
def test_masks_and_merge_are_those_of_the_whole_model(
    method: str, density: float, world: World, new_home: NewHome, adapter: Path, tmp_path: Path
) -> None:
    models = {"adapter": adapter, "whole": whole(world.base, adapter, tmp_path / "model")}
    found: dict[str, Any] = {}
    for name, model in models.items():
        shell = new_home(f"home-{name}")
        choice = {"retention": None, "method": method, "localize": {"density": density}}
        shell("init", world.line(tmp_path / "line.yaml", **choice))
        shell.add(world, "number")
        done = shell.json(
            *("register", "demo", "--task", world.task("colour"), "--model", model, *ACCEPT)
        )
        version = shell.state().tasks["colour"].versions[1]
        facts = done["facts"]
        results = {key: value["value"] for key, value in facts["results"].items()}
        shell("export", "demo", "champion", tmp_path / f"out-{name}")
        merged = (tmp_path / f"out-{name}" / "model.safetensors").read_bytes()
        found[name] = [merged, results, facts.get("outside_share")]
        if density < 1:  # a line of whole task vectors keeps the adapter's own factors
            found[name].append(version.mask)
        shell("verify", "demo")
        shell.check_settled()
    assert found["adapter"] == found["whole"]


@without_mlflow
@pytest.mark.parametrize("mode", ["dataless", "subspace"])
def test_a_registration_computes_each_tensor_at_most_twice(
    mode: str,
    shell: Shell,
    world: World,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    computed: Counter[str] = Counter()
    compute = AdapterCheckpoint.tensor

    def counted(checkpoint: AdapterCheckpoint, name: str) -> Tensor:
        computed.update([name] if name in checkpoint.touched else [])
        return compute(checkpoint, name)

    method = "tsv-m" if mode == "subspace" else "localize-and-stitch"
    values = {"line": "reviews", "base": str(world.base), "family": "text-encoder"}
    line = write_yaml(tmp_path / "l.yaml", values | {"method": method, "localize": {"mode": mode}})
    shell("init", line)
    task = write_yaml(tmp_path / "t.yaml", {"task": "colours"})
    monkeypatch.setattr(AdapterCheckpoint, "tensor", counted)
    shell("register", "reviews", "--task", task, "--model", adapter)
    first = f"{MODULES[1]}.weight"  # also read to see that there is a change
    assert max((n for name, n in computed.items() if name != first), default=0) == (
        2 if mode == "dataless" else 0
    )
    assert computed[first] <= (3 if mode == "dataless" else 1)


@without_mlflow
def test_what_is_recorded_of_an_adapter(line: Shell, world: World, adapter: Path) -> None:
    files = ("--task", world.task("colour"), "--model", adapter)
    done = line.json("register", "demo", *files, *ACCEPT)
    (note,) = [each for each in done["facts"]["notes"] if "adapter" in each]
    assert note.startswith("an adapter (LoRA) of 1,024 bytes on 4 tensors of the base")
    model = line.state().tasks["colour"].versions[1].model
    assert model.size == 1024
    assert model.uri == str(adapter)
    assert line.json("register", "demo", *files, *ACCEPT)["already"]
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_dropout": 0.1}))
    assert line.json("register", "demo", *files, *ACCEPT)["already"], "no other weights"
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 4}))
    assert not line.json("register", "demo", *files, *ACCEPT, "--no-remerge")["already"]
    assert line.state().tasks["colour"].versions[2].model.weights != model.weights


@without_mlflow
def test_a_copy_of_an_adapter_lies_in_the_store(
    line: Shell, world: World, adapter: Path, tmp_path: Path
) -> None:
    files = ("--task", world.task("colour"), "--model", adapter)
    line("register", "demo", *files, *ACCEPT, "--copy")
    shutil.rmtree(adapter)
    version = line.state().tasks["colour"].versions[1]
    assert version.model.uri.startswith("store://")
    line("verify", "demo")


def other_base(folder: Path, world: World, root: Path) -> None:
    base = tiny_bert(root / "other", seed=9)
    configure(folder, base_model_name_or_path=str(base))


def on_an_adapter(folder: Path, world: World, root: Path) -> None:
    first = write_adapter(root / "first", factors(1))
    configure(folder, base_model_name_or_path=str(first))


def larger(folder: Path, world: World, root: Path) -> None:
    wide = {n: torch.ones(2, 20) if "lora_A" in n else v for n, v in factors().items()}
    write_adapter(folder, wide)


def one_sided(folder: Path, world: World, root: Path) -> None:
    write_adapter(
        folder, {n: v for n, v in factors().items() if n != f"{MODULES[1]}.lora_B.weight"}
    )


def configure(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def other_module(folder: Path, world: World, root: Path) -> None:
    write_adapter(folder, {n.replace("layer.1.", "layer.7."): v for n, v in factors().items()})


def pickled(folder: Path, world: World, root: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def configured(**changes: Any) -> Callable[[Path, World, Path], None]:
    return lambda folder, *_: configure(folder, **changes)


def with_nan(folder: Path, world: World, root: Path) -> None:
    tensors = factors()
    tensors[f"{MODULES[2]}.lora_A.weight"][1, 3] = float("nan")
    write_adapter(folder, tensors)


BAD: dict[str, tuple[Callable[[Path, World, Path], None], str]] = {
    "another base": (other_base, "was trained on another base than that of this line"),
    "an adapter on an adapter": (on_an_adapter, "is an adapter on an adapter"),
    "other shapes": (larger, "lora_A [2, 20]"),
    "no B": (one_sided, f"{MODULES[1]}: lora_B missing"),
    "rank 0": (configured(r=0), "a rank of at least 1"),
    "a scaling of NaN": (configured(lora_alpha=float("nan")), "a finite number"),
    "an unknown module": (other_module, "encoder.layer.7.attention"),
    "another kind": (configured(peft_type="VERA"), "peft_type: VERA"),
    "NaN": (with_nan, f"{MODULES[2]}.lora_A.weight: 1 of 32"),
    "a pickle": (pickled, "without adapter_model.safetensors"),
}


@without_mlflow
def test_bad_adapters_are_refused_by_name_and_change_nothing(
    line: Shell, world: World, tmp_path: Path
) -> None:
    line("task", "demo", "--task", world.task("colour"))
    before = line.head_bytes(), everything(line)
    for number, (case, (change, expected)) in enumerate(BAD.items()):
        folder = write_adapter(tmp_path / f"bad-{number}", factors())
        change(folder, world, tmp_path)
        done = line(
            *("register", "demo", "--task", world.task("colour"), "--model", folder), code=3
        )
        assert expected in done.err, case
        assert str(folder) in done.err, case
        assert (line.head_bytes(), everything(line)) == before, case


@without_mlflow
def test_an_adapter_whose_weights_overflow_is_quarantined(
    line: Shell, world: World, tmp_path: Path
) -> None:
    large = {name: torch.full_like(value, 3e30) for name, value in factors().items()}
    folder = write_adapter(tmp_path / "large", large)
    done = line("register", "demo", "--task", world.task("colour"), "--model", folder, code=4)
    assert f"{MODULES[2]}.weight: 256 of 256" in done.out + done.err


@without_mlflow
def test_a_base_of_another_name_is_noted(line: Shell, world: World, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", factors(), base_model_name_or_path="org/other-model")
    files = ("--task", world.task("colour"), "--model", folder)
    done = line("register", "demo", *files, *ACCEPT)
    assert "it was trained on org/other-model" in " ".join(done.out.split())


@without_mlflow
def test_an_adapter_of_a_classifier_brings_its_head(shell: Shell, tmp_path: Path) -> None:
    world = World(tmp_path / "world", "text-classifier")
    tiny_bert(world.base)
    config = LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    folder = adapter_on(
        world.base, tmp_path / "adapter", config, AutoModelForSequenceClassification
    )
    assert "base_model.model.classifier.weight" in load_file(folder / "adapter_model.safetensors")
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    labels = ["no", "yes"]
    rows = [{"text": f"{n * 7919 % 97} x", "label": labels[n % 2]} for n in range(30)]
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (data / f"{split}.jsonl").write_text(text)
    task: dict[str, Any] = {"task": "t", "data": {"path": str(data), "test": "test.jsonl"}}
    file = write_yaml(tmp_path / "t.yaml", task)
    done = shell("register", "demo", "--task", file, "--model", folder, code=3)
    assert "does not name the classes" in done.err
    file = write_yaml(tmp_path / "t.yaml", {**task, "head": {"labels": labels}})
    done = shell("register", "demo", "--task", file, "--model", folder, *ACCEPT)
    out = tmp_path / "out"
    shell("export", "demo", "champion", out, "--task", "t")
    model = AutoModelForSequenceClassification.from_pretrained(out)
    stored = load_file(folder / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    assert torch.equal(model.classifier.weight, stored)
    more = {"task": "u", "head": {"labels": [*labels, "maybe"]}}
    three = write_yaml(tmp_path / "u.yaml", {**task, **more})
    done = shell("register", "demo", "--task", three, "--model", folder, code=3)
    assert "another number of classes" in done.err


def test_an_adapter_from_mlflow(line: Shell, world: World, adapter: Path, tmp_path: Path) -> None:
    client = connect(Home(line.home))
    experiment = client.create_experiment("training", (tmp_path / "artifacts").as_uri())
    run = client.create_run(experiment).info.run_id
    client.log_artifacts(run, str(adapter), "model/peft")
    broken = write_adapter(tmp_path / "broken", factors(), r=3)
    client.log_artifacts(run, str(broken), "broken")
    files = ("--task", world.task("colour"), "--model")
    before = everything(line)
    done = line("register", "demo", *files, f"runs:/{run}/broken", code=3)
    assert f"runs:/{run}/broken does not fit its configuration" in done.err
    assert everything(line) == before
    line("register", "demo", *files, f"runs:/{run}/model", *ACCEPT)
    local = write_adapter(
        tmp_path / "same", factors(), base_model_name_or_path=str(world.base), lora_alpha=3
    )
    assert line.json("register", "demo", *files, local, *ACCEPT)["already"]


@without_mlflow
def test_factors_next_to_frozen_weights_are_applied(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    """The state of a whole model in training, as PEFT names it, and the configuration."""
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["query", "dense"])
    adapter = adapter_on(world.base, tmp_path / "adapter", config, seed=2)
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(world.base), adapter)
    state = tmp_path / "state"
    shutil.copytree(world.base, state)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    assert any("base_layer" in name for name in tensors)
    save_file(tensors, state / WEIGHTS, {"format": "pt"})
    task = write_yaml(tmp_path / "skill.yaml", {"task": "skill"})
    line = world.line(
        tmp_path / "line.yaml",
        retention=None,
        method="task-arithmetic",
        localize={"density": 1.0},
    )
    shell("init", line)
    refused = shell("register", "demo", "--task", task, "--model", state, code=3).err
    assert "adapter_config.json of the training" in " ".join(refused.split())
    shutil.copyfile(adapter / "adapter_config.json", state / "adapter_config.json")
    shell("register", "demo", "--task", task, "--model", state, "--copy")
    shutil.rmtree(state)
    assert shell("verify", "demo").code == 0
    shell("export", "demo", "champion", tmp_path / "out")
    expected, out = merged_by_peft(world.base, adapter), load_file(tmp_path / "out" / WEIGHTS)
    base = load_file(world.base / WEIGHTS)
    changed = [name for name in base if not torch.equal(out[name], base[name])]
    assert changed
    for name in changed:
        change = expected[name] - base[name]
        torch.testing.assert_close(out[name], base[name] + 0.4 * change, atol=1e-6, rtol=1e-5)
