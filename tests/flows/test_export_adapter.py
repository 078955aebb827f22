"""Merged versions as LoRA adapters: peft loads what was written, and it is the version's change."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from restitch.merging.files.checkpoint import Checkpoint
from tests.shell import Shell
from tests.tiny_models import tiny_decoder, tweaked
from tests.worlds import SKILLS, World, write_yaml

pytestmark = pytest.mark.usefixtures("without_mlflow")


def with_adapter(model: torch.nn.Module, adapter: Path) -> dict[str, torch.Tensor]:
    """The weights of a base after peft merged an adapter into it."""
    from peft import PeftModel

    return dict(PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict())


def test_the_adapter_of_a_line_holds_the_change_of_its_linear_layers(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    shell("init", world.line(tmp_path / "line.yaml"))
    for task in SKILLS[:2]:
        shell("register", "demo", "--task", world.task(task), "--model", world.model(task))
    shell("export", "demo", "2", tmp_path / "whole")
    # All triplets: the adapter is the version, except for norms and biases.
    done = shell(
        "export", "demo", "2", tmp_path / "adapter", "--as", "lora", "--rank", "64", "--json"
    ).json
    found = with_adapter(AutoModel.from_pretrained(world.base), tmp_path / "adapter")
    whole, base = Checkpoint.open(tmp_path / "whole"), Checkpoint.open(world.base)
    compared = 0
    for name in base.names:
        is_adapted = name.removesuffix(".weight") in done["ranks"]
        wanted = (whole if is_adapted else base).tensor(name)
        assert torch.allclose(found[name], wanted, atol=1e-5), name
        compared += is_adapted
    assert compared == len(done["ranks"]) > 0
    assert done["kept"] + sum(done["left_out"].values()) == pytest.approx(1, abs=1e-6)
    assert all("weight" not in name or "Norm" in name for name in done["left_out"])
    # It is measured on the same rows as the version.
    shown = shell.json("show", "demo")["results"]
    for task in SKILLS[:2]:
        assert done["results"][task]["merged"] == shown[task]["merged"]
        assert 0 <= done["results"][task]["adapter"] <= 1
    assert done["retention"]["adapter"] >= 0
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card
    assert f"{done['kept']:.2%}" in card
    assert set(done["files"]) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "restitch.json",
    }
    assert str(tmp_path) not in (tmp_path / "adapter" / "adapter_config.json").read_text()


def decoder_line(shell: Shell, folder: Path, kind: str, **changes: Any) -> World:
    """A line of one decoder whose task has no rows, merged."""
    world = World(folder / kind, "causal-lm")
    tiny_decoder(world.base, kind)
    tweaked(world.base, world.model("a"), seed=1, size=0.3, globs=("*h.*", "*layers.*"))
    shell("init", world.line(folder / f"{kind}.yaml", retention=None, **changes))
    file = write_yaml(folder / "a.yaml", {"task": "a"})
    shell("register", "demo", "--task", file, "--model", world.model("a"))
    return world


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_peft_loads_the_adapter_of_a_decoder(shell: Shell, tmp_path: Path, kind: str) -> None:
    choice = {"mode": "subspace", "rank": 0.25, "values": "exact"}
    world = decoder_line(shell, tmp_path, kind, method="tsv-m", localize=choice)
    shell("export", "demo", "1", tmp_path / "whole")
    done = shell(
        "export", "demo", "1", tmp_path / "adapter", "--as", "lora", "--keep", "1", "--json"
    ).json
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == (kind == "gpt2")
    assert config["task_type"] == "CAUSAL_LM"
    assert done["results"] == {}
    found = with_adapter(
        AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32),
        tmp_path / "adapter",
    )
    whole = Checkpoint.open(tmp_path / "whole")
    for module in done["ranks"]:
        wanted = whole.tensor(f"{module}.weight").float()
        assert torch.allclose(found[f"{module}.weight"], wanted, atol=1e-4), module


def test_a_share_and_a_rank_choose_the_size(shell: Shell, tmp_path: Path) -> None:
    decoder_line(shell, tmp_path, "llama")

    def written(*options: str) -> Any:
        out = tmp_path / "-".join(options).replace(".", "_")
        return shell("export", "demo", "1", out, "--as", "lora", *options, "--json").json

    few, more = written("--rank", "1"), written("--rank", "4")
    assert few["parameters"] < more["parameters"]
    assert few["kept"] < more["kept"]
    half = written("--keep", "0.5")
    outside = sum(half["left_out"].values())
    assert 0.5 <= half["kept"] / (1 - outside) < 0.6
    text = shell("export", "demo", "1", tmp_path / "x", "--as", "lora").out
    assert "parameters" in text
    assert "of the squared change" in text


def test_options_that_do_not_go_together_are_refused(shell: Shell, tmp_path: Path) -> None:
    decoder_line(shell, tmp_path, "llama")
    for options, message in (
        (("--rank", "4"), "add --as lora"),
        (("--as", "lora", "--rank", "4", "--keep", "0.5"), "give one"),
        (("--as", "lora", "--keep", "1.5"), "is no share"),
        (("--as", "lora", "--keep", "nan"), "is no share"),
        (("--as", "lora", "--task", "a"), "is for all tasks"),
    ):
        done = shell("export", "demo", "1", tmp_path / "out", *options, code=2)
        assert message in " ".join(done.err.split())
