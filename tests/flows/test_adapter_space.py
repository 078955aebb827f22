"""Lines that merge the vectors of (IA)^3 adapters: the base is ones, all else as for weights."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import IA3Config, LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from restitch.merging.adapters.checkpoint import AdapterCheckpoint
from restitch.merging.adapters.vectors import VectorSpace
from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import Checkpoint
from restitch.registry.home import Home
from restitch.serving.follower import Follower
from restitch.serving.served_version import read_version
from restitch.serving.version_folder import version_folder
from tests.merging.adapters.peft_folders import adapter_on, merged_by_peft
from tests.shell import Shell
from tests.tiny_models import tiny_bert, tiny_decoder, tiny_seq2seq
from tests.worlds import write_yaml

pytestmark = pytest.mark.usefixtures("without_mlflow")

ADAPTER = "adapter_model.safetensors"
ROWS = [
    {"text": f"{word} {other}", "label": at % 2}
    for at, (word, other) in enumerate(zip("abcdefgh" * 2, "hgfedcba" * 2, strict=True))
]
# The architecture, its family and auto class, and the modules of its adapters.
KINDS: dict[str, tuple[str, Any, list[str], list[str]]] = {
    "t5": ("seq2seq-lm", AutoModelForSeq2SeqLM, ["k", "v", "wo"], ["wo"]),
    "gpt2": ("causal-lm", AutoModelForCausalLM, ["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "llama": (
        "causal-lm",
        AutoModelForCausalLM,
        ["k_proj", "v_proj", "down_proj"],
        ["down_proj"],
    ),
}


class AdapterLine:
    """A line of adapters on a tiny model, with two members."""

    def __init__(self, kind: str, shell: Shell, folder: Path) -> None:
        self.kind, self.shell, self.folder = kind, shell, folder
        self.family, self.auto_class, self.targets, self.feedforward = KINDS[kind]
        self.base = folder / "base"
        (tiny_seq2seq if kind == "t5" else tiny_decoder)(self.base, kind)

    def init(self, method: Any = "averaging", **keys: Any) -> None:
        values = {"line": "demo", "base": str(self.base), "family": self.family}
        values |= {"space": "adapter", "method": method, **keys}
        self.shell("init", write_yaml(self.folder / "line.yaml", values))

    def task(self, name: str) -> Path:
        data = self.folder / f"data-{name}"
        data.mkdir(exist_ok=True)
        rows = "\n".join(json.dumps(row) for row in ROWS)
        for split in ("train", "test"):
            (data / f"{split}.jsonl").write_text(rows)
        files = {"train": "train.jsonl", "test": "test.jsonl"}
        spec = {"task": name, "data": {"path": str(data), **files}}
        scored = {"prompt": "{text}", "choices": ["no", "yes"]}
        return write_yaml(self.folder / f"{name}.yaml", {**spec, **scored})

    def adapter(self, name: str, seed: int, **config: Any) -> Path:
        modules = {"target_modules": self.targets, "feedforward_modules": self.feedforward}
        given = IA3Config(**(modules | config))
        return adapter_on(self.base, self.folder / name, given, self.auto_class, seed=seed)

    def register(self, name: str, model: Path) -> Any:
        accept = ("--accept-no-gain", "--reason", "random vectors")
        files = ("--task", self.task(name), "--model", model)
        return self.shell.json("register", "demo", *files, *accept)

    def two(self) -> list[dict[str, Tensor]]:
        """Register two adapters, and return their vectors."""
        folders = [self.adapter(name, seed) for seed, name in enumerate("ab", 1)]
        for folder in folders:
            self.register(folder.name, folder)
        return [load_file(folder / ADAPTER) for folder in folders]

    def exported(self, *options: str) -> Path:
        out = self.folder / f"out{'-'.join(options)}"
        self.shell("export", "demo", "champion", out, *options)
        return out


@pytest.fixture(params=KINDS)
def line(request: pytest.FixtureRequest, shell: Shell, tmp_path: Path) -> AdapterLine:
    return AdapterLine(request.param, shell, tmp_path)


@pytest.fixture
def t5(shell: Shell, tmp_path: Path) -> AdapterLine:
    return AdapterLine("t5", shell, tmp_path)


def test_the_vectors_of_the_members_are_merged_and_peft_loads_them(line: AdapterLine) -> None:
    line.init()
    one, other = line.two()
    out = line.exported()
    merged = load_file(out / ADAPTER)
    assert merged.keys() == one.keys()
    for name, vector in merged.items():
        mean = 1 + ((one[name].double() - 1) + (other[name].double() - 1)) / 2
        assert torch.allclose(vector.double(), mean, atol=1e-6), name
    found = merged_by_peft(line.base, out, line.auto_class)
    base = Checkpoint.open(line.base)
    scaled = AdapterCheckpoint.read(out, base)
    for name in base.names:
        assert torch.allclose(found[name], scaled.tensor(name), atol=1e-6), name
        touched = name in scaled.touched
        assert touched or torch.equal(found[name], base.tensor(name))
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["peft_type"] == "IA3"
    assert set(config["feedforward_modules"]) < set(config["target_modules"])
    line.shell("verify", "demo")
    line.shell.check_settled()
    card = (out / "README.md").read_text()
    assert "library_name: peft" in card
    digest = Checkpoint.from_files(out, {ADAPTER: out / ADAPTER}).digest()
    assert f"It prints `{digest}`" in card
    # What is served and evaluated is the base with the exported vectors.
    with patch.dict(os.environ, {"RESTITCH_HOME": str(line.shell.home)}):
        served = Checkpoint.open(version_folder(read_version(Home.from_environment(), "demo")))
    assert all(torch.equal(served.tensor(n), scaled.tensor(n)) for n in base.names)
    shown = line.shell.json("show", "demo", "2")
    assert shown["members"].keys() == {"a", "b"}
    again = line.register("a", out)["facts"]["results"]["finetuned"]["value"]
    assert again == shown["results"]["a"]["merged"]


def test_an_adapter_is_a_member_as_on_a_line_of_weights(line: AdapterLine) -> None:
    line.init()
    adapter = line.adapter("a", 1)
    ours = line.register("a", adapter)["facts"]["results"]
    values = {"line": "weights", "base": str(line.base), "family": line.family}
    values |= {"method": "averaging"}
    line.shell("init", write_yaml(line.folder / "weights.yaml", values))
    accept = ("--accept-no-gain", "--reason", "random vectors")
    files = ("--task", line.task("a"), "--model", adapter)
    theirs = line.shell.json("register", "weights", *files, *accept)["facts"]["results"]
    for name in ("base", "finetuned", "localizable", "grafted"):
        assert ours[name]["value"] == theirs[name]["value"], name


@pytest.mark.parametrize(
    "method",
    ["ties", "consensus-ta", "weighted-stitch", "tall"],
)
def test_elementwise_methods_merge_vectors(t5: AdapterLine, method: str) -> None:
    of_tasks = method == "tall"
    t5.init("averaging" if of_tasks else method)
    t5.two()
    if of_tasks:
        t5.shell("experts", "demo", "champion", "--method", method)
    else:
        merged = load_file(t5.exported() / ADAPTER)
        assert any(not torch.equal(v, torch.ones_like(v)) for v in merged.values())
    t5.shell("verify", "demo")


def test_masks_keep_the_vectors_of_one_owner_bit_for_bit(t5: AdapterLine) -> None:
    t5.init("localize-and-stitch", localize={"mode": "dataless", "density": 0.2})
    one, other = t5.two()
    merged = load_file(t5.exported() / ADAPTER)
    owned = 0
    for name, vector in merged.items():
        kept = vector != 1
        from_one, from_other = vector == one[name], vector == other[name]
        mean = torch.isclose(vector, (one[name] + other[name]) / 2)
        assert bool((~kept | from_one | from_other | mean).all())
        owned += int((kept & (from_one | from_other)).sum())
    assert owned


def test_a_specialist_is_an_adapter_of_its_own(t5: AdapterLine) -> None:
    t5.init("task-arithmetic")
    one, other = t5.two()
    t5.shell("experts", "demo", "champion", "--method", "tall")
    special = load_file(t5.exported("--task", "a") / ADAPTER)
    masked = 0
    for name, vector in special.items():
        shared = 1 + (one[name] - 1) + (other[name] - 1)
        kept = torch.isclose(vector, shared, atol=1e-6)
        assert bool((kept | (vector == 1)).all())
        masked += int((~kept).sum())
    assert 0 < masked < sum(vector.numel() for vector in special.values())


def test_rolling_back_and_retiring_restore_the_earlier_vectors(t5: AdapterLine) -> None:
    t5.init("task-arithmetic")
    t5.register("a", t5.adapter("a", 1))
    first = t5.exported()
    before = load_file(first / ADAPTER)
    shutil.rmtree(first)
    t5.register("b", t5.adapter("b", 2))
    t5.shell("rollback", "demo", "1", "--reason", "a test")
    assert all(torch.equal(v, before[n]) for n, v in load_file(t5.exported() / ADAPTER).items())
    t5.shell("verify", "demo")


def bad_adapters(line: AdapterLine) -> Iterator[tuple[str, Path, str]]:
    lora = LoraConfig(r=2, target_modules=["k"])
    folder = line.folder / "bad"
    yield "lora", adapter_on(line.base, folder / "lora", lora, line.auto_class), "LoRA adapter"
    yield "whole", line.base, "whole weights"
    fewer = line.adapter("bad/fewer", 1, target_modules=["k", "wo"])
    yield "fewer", fewer, "SelfAttention.v.ia3_l: line 16 outputs, adapter none"
    sides = line.adapter("bad/sides", 1, feedforward_modules=[])
    yield "sides", sides, "wo.ia3_l: line 32 inputs, adapter 16 outputs"
    more = line.adapter("bad/more", 1, modules_to_save=["lm_head"])
    yield "more", more, "more than vectors"


def test_models_that_are_no_vectors_of_the_line_are_refused(t5: AdapterLine) -> None:
    t5.init()
    before = t5.shell.state()
    for name, model, message in bad_adapters(t5):
        files = ("--task", t5.task("a"), "--model", model)
        done = t5.shell("register", "demo", *files, code=3)
        assert message in " ".join(done.err.split()), name
        assert "Traceback" not in done.err
    assert t5.shell.state() == before


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"method": "tsv-m"}, "merges the weights of layers"),
        ({"method": "regmean"}, "merges the weights of layers"),
        ({"localize": {"mode": "fisher"}}, "give dataless"),
        ({"space": {"target_modules": ["k", "attn"]}}, "attn"),
        ({"space": {"target_modules": ["k"], "feedforward_modules": ["wo"]}}, "wo"),
        ({"space": {"target_modules": []}}, "target_modules"),
        ({"space": "lora"}, "space"),
    ],
)
def test_line_files_that_cannot_work_are_refused(
    t5: AdapterLine, keys: dict[str, Any], message: str
) -> None:
    values = {"line": "demo", "base": str(t5.base), "family": t5.family}
    values |= {"space": "adapter", "method": "averaging", **keys}
    file = write_yaml(t5.folder / "line.yaml", values)
    done = t5.shell("init", file, code=3)
    assert message in " ".join(done.err.split())
    assert not list((t5.shell.home / "store" / "lines").glob("*"))


def test_a_family_with_own_heads_is_refused(shell: Shell, tmp_path: Path) -> None:
    tiny_bert(tmp_path / "base")
    values = {"line": "demo", "base": str(tmp_path / "base"), "family": "text-classifier"}
    values |= {"space": "adapter", "method": "averaging"}
    done = shell("init", write_yaml(tmp_path / "line.yaml", values), code=3)
    assert "cannot merge the vectors of adapters" in done.err


def test_the_space_cannot_change_and_the_same_file_changes_nothing(t5: AdapterLine) -> None:
    t5.init()
    t5.init()
    values = {"line": "demo", "base": str(t5.base), "family": t5.family, "method": "averaging"}
    done = t5.shell("init", write_yaml(t5.folder / "line.yaml", values), code=3)
    assert "space" in done.err
    assert "cannot change" in done.err


def test_the_vectors_of_a_base(t5: AdapterLine) -> None:
    weights = Checkpoint.open(t5.base)
    space = VectorSpace.of(weights, ["k", "wo"], ["wo"], "org/base")
    shapes = {name: module.shape for name, module in space.modules.items()}
    assert shapes["encoder.block.0.layer.0.SelfAttention.k.ia3_l"] == (16, 1)
    assert shapes["encoder.block.1.layer.1.DenseReluDense.wo.ia3_l"] == (1, 32)
    assert list(shapes) == sorted(shapes)
    with pytest.raises(BadInput, match="org/base lacks"):
        VectorSpace.of(weights, ["q_proj"], [], "org/base")


def test_other_forms_of_an_export_and_studies_of_weights_are_refused(t5: AdapterLine) -> None:
    t5.init()
    t5.two()
    for options in (("--as", "lora"), ("--shard-size", "1GB")):
        done = t5.shell("export", "demo", "champion", t5.folder / "out", *options, code=3)
        assert "adapter" in done.err
        assert not (t5.folder / "out").exists()
    for study in ("continual", "runtime", "shots"):
        done = t5.shell("study", study, "demo", code=3)
        assert "works with the weights of layers" in " ".join(done.err.split())


def test_a_folder_follows_the_adapters_and_a_loaded_model_is_refused(t5: AdapterLine) -> None:
    t5.init()
    t5.register("one", t5.adapter("one", 1))
    shell, folder = t5.shell, t5.folder / "followed"
    shell("follow", "demo", folder, "--once")
    t5.register("two", t5.adapter("two", 2))
    assert shell("follow", "demo", folder, "--once", "--json").json["action"] == "updated"
    shell("export", "demo", "champion", t5.folder / "exported")
    files = [each / ADAPTER for each in (folder / "current", t5.folder / "exported")]
    assert files[0].read_bytes() == files[1].read_bytes()
    with shell.inside(), pytest.raises(BadInput, match="versions of line demo are adapters"):
        Follower("demo")
