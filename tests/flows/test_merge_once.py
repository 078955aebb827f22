"""Merges without a line: the bytes of a line, and what is refused."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import restitch
from restitch.merging.files.mapped_file import MappedFile
from restitch.registry.home import Home
from tests.conftest import NewHome
from tests.shell import Shell
from tests.tiny_models import tiny_decoder, tweaked
from tests.worlds import SKILLS, World, write_yaml

pytestmark = pytest.mark.usefixtures("without_mlflow")


def options(world: World, *tasks: str) -> list[object]:
    models = [part for task in tasks for part in ("--model", f"{task}={world.model(task)}")]
    return ["--base", world.base, *models]


WEIGHTS = "model.safetensors"


def bytes_of(folder: Path) -> bytes:
    return (folder / WEIGHTS).read_bytes()


CASES: list[tuple[str, dict[str, Any], dict[str, Any] | None]] = [
    ("ties", {"density": 0.3}, None),
    ("tsv-m", {}, None),
    ("localize-and-stitch", {}, {"mode": "dataless", "density": 0.2}),
    ("tsv-m", {}, {"mode": "subspace", "rank": 0.25}),
]


@pytest.mark.parametrize(("method", "settings", "localize"), CASES)
def test_the_merge_has_the_bytes_of_a_line(
    world: World,
    new_home: NewHome,
    tmp_path: Path,
    method: str,
    settings: dict[str, Any],
    localize: dict[str, Any] | None,
) -> None:
    line = new_home("line")
    named = {"name": method, "settings": settings}
    file = tmp_path / "line.yaml"
    choice = localize or {"density": 1.0}
    line("init", world.line(file, retention=None, method=named, localize=choice))
    for task in SKILLS[:2]:
        task_file = write_yaml(tmp_path / f"{task}.yaml", {"task": task})
        line("register", "demo", "--task", task_file, "--model", world.model(task))
    line("export", "demo", "2", tmp_path / "wanted")
    once = new_home("once")
    chosen = [f"{key}={value}" for key, value in settings.items()]
    given = [part for each in chosen for part in ("--set", each)]
    given += [part for k, v in (localize or {}).items() for part in ("--localize", f"{k}={v}")]
    out = tmp_path / "out"
    # The order of the models does not matter.
    command = ["merge", *options(world, *reversed(SKILLS[:2])), "--method", method]
    done = once(*command, *given, "--out", out, "--json").json
    assert bytes_of(out) == bytes_of(tmp_path / "wanted")
    assert done["method"] == method
    assert set(done["models"]) == set(SKILLS[:2])
    assert json.loads((out / "restitch.json").read_text())["settings"] == done["settings"]
    assert AutoModel.from_pretrained(out) is not None
    card = (out / "README.md").read_text()
    assert str(world.root) not in card
    # Nothing is left but caches.
    assert not Home(once.home).store_path.exists()
    assert not list((once.home / "scratch").iterdir())


def test_a_dry_run_checks_and_writes_nothing(world: World, shell: Shell, tmp_path: Path) -> None:
    command = ["merge", *options(world, *SKILLS[:2]), "--method", "ties", "--dry-run"]
    done = shell(*command)
    assert "would merge 2 models by ties" in done.out
    assert shell(*command, "--json").json["written"] > 0
    assert not list(tmp_path.glob("out*"))


def test_a_file_of_our_own_form_names_paths_relative_to_itself(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    (tmp_path / "base").symlink_to(world.base)
    (tmp_path / "one").symlink_to(world.model(SKILLS[0]))
    values = {"base": "base", "models": {"one": "one"}, "method": "averaging"}
    file = write_yaml(tmp_path / "merge.yaml", values)
    shell("merge", file, "--out", tmp_path / "out")
    assert bytes_of(tmp_path / "out") != bytes_of(world.base)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--method", "fisher-merging"], 3, "it needs rows of every task"),
        (["--method", "tall"], 3, "it gives one model per task"),
        (["--method", "tiez"], 3, "did you mean 'ties'"),
        (["--method", "ties", "--set", "densty=0.2"], 3, "did you mean 'density'"),
        (["--method", "ties", "--set", "density"], 2, "in another form"),
        (["--method", "ties", "--localize", "mode=distilled"], 3, "without data"),
        (["--method", "ties", "--localize", "density=2"], 3, "density"),
        (["--method", "ties", "--family", "clip"], 3, "not of family clip"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    world: World, shell: Shell, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    out = tmp_path / "out"
    done = shell("merge", *options(world, SKILLS[0]), *arguments, "--out", out, code=code)
    assert message in " ".join(done.err.split())
    assert not out.exists()


def test_models_of_another_base_and_an_out_that_exists_are_refused(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    tiny_decoder(other)
    command = ["--method", "ties", "--base", world.base, "--model", f"a={other}"]
    done = shell("merge", *command, "--out", tmp_path / "out", code=3)
    assert "is a decoder language model, and the base" in done.err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    good = ["merge", *options(world, SKILLS[0]), "--method", "ties"]
    assert "is not empty" in shell(*good, "--out", tmp_path / "full", code=3).err
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_a_mergekit_file_merges_all_tensors(shell: Shell, tmp_path: Path) -> None:
    world = World(tmp_path, "causal-lm")
    tiny_decoder(world.base, "qwen2")
    for seed, name in enumerate("ab"):
        tweaked(world.base, world.model(name), seed=seed, size=0.2, globs=("*",))
    values = {
        "merge_method": "task_arithmetic",
        "base_model": str(world.base),
        "models": [
            {"model": str(world.model(name)), "parameters": {"weight": 0.5}} for name in "ab"
        ],
        "parameters": {"normalize": False, "int8_mask": True},
        "dtype": "float32",
    }
    file = tmp_path / "kit.yaml"
    file.write_text(yaml.safe_dump(values))
    done = shell("merge", file, "--out", tmp_path / "out", "--json").json
    assert (done["method"], done["settings"]) == ("task-arithmetic", {"alpha": 0.5})
    assert all(model["outside_share"] == 0 for model in done["models"].values())
    assert done["dtype"] == done["base_dtype"] == "float32"
    values["out_dtype"] = "bfloat16"
    file.write_text(yaml.safe_dump(values))
    narrow = shell("merge", file, "--dry-run", "--json").json
    assert (narrow["dtype"], narrow["written"]) == ("bfloat16", done["written"] / 2)


@pytest.mark.parametrize(("method", "settings", "localize"), [CASES[0], *CASES[2:]])
def test_weights_of_another_type_are_rounded_once(
    world: World,
    shell: Shell,
    tmp_path: Path,
    method: str,
    settings: dict[str, Any],
    localize: dict[str, Any] | None,
) -> None:
    models = {task: world.model(task) for task in SKILLS[:2]}

    def merged(dtype: str | None) -> dict[str, torch.Tensor]:
        found = restitch.merge(
            world.base, models, method, settings=settings, localize=localize, dtype=dtype
        )
        folder = tmp_path / str(dtype)
        report = found.save(folder)
        assert report.dtype == (dtype or "float32")
        written: dict[str, torch.Tensor] = load_file(folder / WEIGHTS)
        assert report.written == sum(value.nbytes for value in written.values())
        return written

    with shell.inside():
        expected = merged(None)
        merged("float32")
        assert bytes_of(tmp_path / "None") == bytes_of(tmp_path / "float32")
        for dtype in (torch.bfloat16, torch.float16):
            narrow = merged(str(dtype).removeprefix("torch."))
            assert narrow.keys() == expected.keys()
            for name, value in expected.items():
                wanted = value.to(dtype) if value.is_floating_point() else value
                assert torch.equal(narrow[name], wanted), name
        model = AutoModel.from_pretrained(tmp_path / "bfloat16")
    assert model.dtype == torch.bfloat16
    assert json.loads((tmp_path / "bfloat16" / "config.json").read_text())["dtype"] == "bfloat16"
    assert "rounded once" in (tmp_path / "bfloat16" / "README.md").read_text()
    assert "rounded once" not in (tmp_path / "float32" / "README.md").read_text()


def test_a_type_that_cannot_be_written_is_refused(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    command = ["merge", *options(world, SKILLS[0]), "--method", "ties", "--out", tmp_path / "out"]
    refused = shell(*command, "--dtype", "int8", code=3).err
    assert "dtype" in refused
    assert "'float32', 'bfloat16' or 'float16'" in refused
    values = load_file(world.base / WEIGHTS)
    name = next(name for name, value in values.items() if value.ndim > 1)
    values[name].view(-1)[3] = 7e4
    large = shutil.copytree(world.base, tmp_path / "large")
    save_file(values, large / WEIGHTS, {"format": "pt"})
    command[2] = large
    refused = shell(*command, "--dtype", "float16", code=3).err
    assert f"the merged weights of {name} do not fit into float16" in refused
    assert "at most 65504" in refused
    assert not (tmp_path / "out").exists()
    shell(*command, "--dtype", "bfloat16")


def test_a_merge_from_python_is_the_same(world: World, shell: Shell, tmp_path: Path) -> None:
    shell("merge", *options(world, *SKILLS[:2]), "--method", "ties", "--out", tmp_path / "one")
    models = {task: world.model(task) for task in SKILLS[:2]}
    with shell.inside():
        merged = restitch.merge(world.base, models, "ties", settings={"density": 0.2})
        assert merged.report.as_dict()["out"] is None
        merged.save(tmp_path / "two")
        assert merged.report.out == str(tmp_path / "two")
        with pytest.raises(restitch.BadInput, match="is not empty"):
            merged.save(tmp_path / "two")
        loaded = merged.load().state_dict()
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    expected = load_file(tmp_path / "two" / "model.safetensors")
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    with pytest.raises(restitch.RestitchError, match="did you mean 'ties'"):
        restitch.merge(world.base, models, "tiez")


def test_every_weight_is_hashed_once(
    world: World, shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hashed: Counter[tuple[MappedFile, int, int]] = Counter()
    digest = MappedFile._digest

    def counting(file: MappedFile, start: int, size: int) -> str:
        hashed[file, start, size] += 1
        return digest(file, start, size)

    monkeypatch.setattr(MappedFile, "_digest", counting)
    copies = {}
    for task in SKILLS[:2]:  # other files than those that this process knows
        copies[task] = shutil.copytree(world.model(task), tmp_path / task)
    given = [part for task, model in copies.items() for part in ("--model", f"{task}={model}")]
    base = shutil.copytree(world.base, tmp_path / "base")
    shell("merge", "--base", base, *given, "--method", "ties", "--out", tmp_path / "out")
    assert len({file for file, _, _ in hashed}) == 3
    assert set(hashed.values()) == {1}


def test_an_adapter_is_merged_as_its_whole_model(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=3, target_modules=["query"], init_lora_weights=False)
    model = get_peft_model(AutoModel.from_pretrained(world.base), config)
    model.save_pretrained(str(tmp_path / "adapter"))
    merged: Any = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "whole")
    found = []
    for kind in ("adapter", "whole"):
        given = [*options(world, SKILLS[0]), "--model", f"z={tmp_path / kind}"]
        shell("merge", *given, "--method", "task-arithmetic", "--out", tmp_path / f"out-{kind}")
        found.append(load_file(tmp_path / f"out-{kind}" / "model.safetensors"))
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], atol=1e-6), name
