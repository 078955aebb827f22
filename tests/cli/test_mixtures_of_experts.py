"""Lines of models whose experts are apart in the file and joined in the model."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from restitch.modeling.data.rows import Example
from restitch.modeling.families.family import get_family
from restitch.registry.specs.head import HeadSpec
from tests.conftest import NewHome, leave_mlflow_alone
from tests.shell import Shell
from tests.tiny_models import tiny_experts, tweaked
from tests.worlds import World, write_rows, write_yaml

pytestmark = pytest.mark.usefixtures("without_mlflow")

FAMILY = get_family("causal-lm")
CHOICES = ("red", "blue", "are")
TEXTS = tuple(f"{'abcdefgh'[n % 8 :]} {n * 79 % 97}" for n in range(16))


@dataclass(frozen=True)
class Line:
    """A home with a line of two members, and its world."""

    shell: Shell
    world: World
    registered: dict[str, Any]


def answers(folder: Path) -> list[str]:
    """The choice of a model for each text."""
    rows = [Example((f"{text} is",), None, "a row", CHOICES) for text in TEXTS]
    with torch.inference_mode():
        model = FAMILY.load(folder)
        head = FAMILY.build_head(model, folder, HeadSpec(labels=CHOICES))
        scores = FAMILY.logits(model, FAMILY.preprocessor(folder)(rows), head)
    return [CHOICES[best] for best in scores.argmax(1).tolist()]


def joined(folder: Path, to: Path) -> Path:
    """The same model in a file that holds the experts of a layer in one tensor."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(to, save_original_format=False)
    return to


def made(root: Path, kind: str) -> World:
    """A tiny base with two skills."""
    world = World(root, FAMILY.name)
    tiny_experts(world.base, kind)
    for seed, name in enumerate(("colour", "number")):
        model = tweaked(world.base, world.model(name), seed=seed, size=0.5, globs=("*layers.*",))
        rows = [{"a": t, "label": c} for t, c in zip(TEXTS, answers(model), strict=True)]
        data = world.root / "data" / name
        for split in ("train", "test"):
            write_rows(data / f"{split}.jsonl", rows)
        values = {"prompt": "{a} is", "choices": list(CHOICES)}
        files = {"path": str(data), "train": "train.jsonl", "test": "test.jsonl"}
        write_yaml(world.task(name), {"task": name, "data": files, **values})
    return world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return made(tmp_path_factory.mktemp("experts"), "mixtral")


@pytest.fixture(scope="module")
def line(world: World, tmp_path_factory: pytest.TempPathFactory) -> Line:
    root = tmp_path_factory.mktemp("line")
    with pytest.MonkeyPatch.context() as patched:
        leave_mlflow_alone(patched)
        shell = Shell(root / "home")
        values = {"localize": {"density": 0.8}, "retention": None, "gates": {"max_task_drop": 1.0}}
        shell("init", world.line(root / "line.yaml", **values))
        return Line(shell, world, {name: shell.add(world, name) for name in ("colour", "number")})


def test_members_are_measured_merged_and_exported_as_they_are_stored(
    line: Line, tmp_path: Path
) -> None:
    for name, found in line.registered.items():
        assert (found["state"], found["merged"]["action"]) == ("ready", "promoted"), name
    results = line.registered["number"]["merged"]["record"]["results"]
    assert {result["finetuned"] for result in results.values()} == {1.0}
    line.shell("export", "demo", "champion", tmp_path / "out")
    base = load_file(line.world.base / "model.safetensors")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == base.keys()
    for name, result in results.items():
        pairs = zip(answers(tmp_path / "out"), answers(line.world.model(name)), strict=True)
        right = [one == other for one, other in pairs]
        assert sum(right) / len(right) == result["merged"]
    assert line.shell.json("verify", "demo")["intact"] is True


@pytest.mark.parametrize(
    "localize",
    [
        {"mode": "trained", "density": 0.3, "shots": 4, "epochs": 1},
        pytest.param({"mode": "distilled", "density": 0.3, "shots": 4}, marks=pytest.mark.slow),
        pytest.param({"mode": "fisher", "density": 0.3, "shots": 4}, marks=pytest.mark.slow),
    ],
    ids=lambda localize: str(localize["mode"]),
)
def test_every_localizer_selects_weights_of_experts(
    world: World, new_home: NewHome, tmp_path: Path, localize: dict[str, Any]
) -> None:
    shell = new_home(localize["mode"])
    shell("init", world.line(tmp_path / "line.yaml", retention=None, localize=localize))
    shell.add(world, "colour", "--accept-no-gain", "--reason", "a test")
    version = shell.state().tasks["colour"].versions[1]
    assert version.state == "ready", version.reason
    shell("export", "demo", "champion", tmp_path / "out")
    base, merged = (
        load_file(folder / "model.safetensors") for folder in (world.base, tmp_path / "out")
    )
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, base[name])}
    assert any(".experts." in name for name in changed)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mats", "fisher-merging"])
def test_methods_with_statistics_measure_the_models(
    world: World, new_home: NewHome, tmp_path: Path, method: str
) -> None:
    shell = new_home(method)
    values = {"retention": None, "method": method, "localize": None}
    shell("init", world.line(tmp_path / "line.yaml", **values))
    for name in ("colour", "number"):
        shell.add(world, name, "--accept-no-gain", "--reason", "a test")
    assert set(shell.json("show", "demo", "champion")["members"]) == {"colour", "number"}


def test_elementwise_merges_of_experts_apart_and_joined_are_the_same(
    world: World, tmp_path: Path
) -> None:
    own = {name: world.model(name) for name in ("colour", "number")}
    whole = {name: joined(folder, tmp_path / name) for name, folder in own.items()}
    shell, bases = Shell(tmp_path / "home"), (world.base, joined(world.base, tmp_path / "base"))
    for base, models, out in zip(bases, (own, whole), ("apart", "joined"), strict=True):
        given = [f"--model={name}={folder}" for name, folder in models.items()]
        kept = ("--method", "localize-and-stitch", "--localize", "density=0.4")
        shell(
            "merge", "--base", base, *given, *kept, "--family", FAMILY.name, "--out", tmp_path / out
        )
    one, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / form).state_dict()
        for form in ("apart", "joined")
    )
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_models_in_another_form_than_the_base_are_refused_with_what_to_do(
    line: Line, world: World, tmp_path: Path
) -> None:
    model = joined(world.model("colour"), tmp_path / "joined")
    files = ("--task", world.task("colour"), "--model", model)
    done = line.shell("register", "demo", *files, code=None)
    assert "the base has a tensor for each expert" in " ".join((done.out + done.err).split())
