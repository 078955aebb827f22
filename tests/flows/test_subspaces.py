"""Lines that keep subspaces instead of masks, through the command line."""

import re
from collections.abc import Iterator
from html import unescape
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from restitch.merging.files.delta import open_delta
from restitch.merging.files.factor_file import FactorFile
from tests.conftest import NewHome, leave_mlflow_alone
from tests.flows.test_localizing import with_splits
from tests.shell import Shell
from tests.worlds import SKILLS, World, write_yaml

pytestmark = pytest.mark.usefixtures("without_mlflow")


def init(shell: Shell, world: World, folder: Path, method: str = "tsv-m", **localize: Any) -> None:
    choice = {"mode": "subspace", **localize}
    shell("init", world.line(folder / "line.yaml", retention=None, method=method, localize=choice))


def add(shell: Shell, world: World, folder: Path, task: str, *options: str) -> Any:
    """Register a model whose task has no rows: all of the bytes and none of the evaluations."""
    file = write_yaml(folder / f"{task}.yaml", {"task": task})
    model = world.model(task)
    return shell("register", "demo", "--task", file, "--model", model, *options, "--json").json


@pytest.fixture(scope="module")
def three_subspaces(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A line of three members, whose studies measure it."""
    root = tmp_path_factory.mktemp("subspaces")
    shell = Shell(root / "home")
    with pytest.MonkeyPatch.context() as patch:
        leave_mlflow_alone(patch)
        init(shell, world, root)
        for task in SKILLS:
            file = with_splits(world, root / task, task)
            shell("register", "demo", "--task", file, "--model", world.model(task))
        yield shell


def factors_of(shell: Shell, task: str) -> FactorFile:
    delta = shell.state().tasks[task].versions[1].delta
    file = open_delta(shell.home / "store" / "blobs" / str(delta))
    assert isinstance(file, FactorFile)
    return file


def test_the_order_of_registration_does_not_matter_and_retiring_undoes_joining(
    world: World, new_home: NewHome, tmp_path: Path
) -> None:
    found = set()
    for number, order in enumerate(list(permutations(SKILLS))[:3]):
        shell = new_home(f"home-{number}")
        init(shell, world, tmp_path, rank=0.25)
        for task in order:
            add(shell, world, tmp_path, task)
        found.add((shell.ledger().merged(3).recipe_digest, shell.patch_bytes()))
    assert len(found) == 1
    without = new_home("without")
    init(without, world, tmp_path, rank=0.25)
    for task in order[:2]:
        add(without, world, tmp_path, task)
    shell("retire", "demo", order[2], "--reason", "test")
    assert shell.patch_bytes() == without.patch_bytes()


def test_a_line_of_subspaces_is_verified_rebuilt_and_analyzed(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    init(shell, world, tmp_path)
    for task in SKILLS[:2]:
        file = with_splits(world, tmp_path / task, task)
        done = shell("register", "demo", "--task", file, "--model", world.model(task))
        assert re.search(r"[\d,]+ numbers for [\d,]+ weights", done.out)
    for command in ("status", "show"):
        told = shell(command, "demo").out
        assert "numbers" in told
        assert "density" not in told
    shown = shell.json("show", "demo")
    facts = shown["members"][SKILLS[0]]["facts"]
    assert facts["localizer"] == "subspace/1"
    assert facts["delta_bytes"] < 0.5 * shell.state().base.size
    assert shell.json("verify", "demo")["rebuilt"] == [1, 2]
    shell("export", "demo", "2", tmp_path / "out")
    done = shell("analyze", "demo", "--densities", "1", "--out", tmp_path / "analysis")
    assert "overlap of the subspaces" in done.out
    assert (tmp_path / "analysis" / "overlap.png").exists()
    assert not (tmp_path / "analysis" / "jaccard.png").exists()
    shell("report", "demo", "2", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Pairs of subspaces with the largest overlap" in page
    assert "Masks" not in page
    assert "Members with their subspaces and deltas" in page
    assert "only this task's subspace" in unescape(page)
    assert "mask</th>" not in page


@pytest.mark.parametrize(
    "study",
    [
        "density",
        "continual",
        # These read a line's deltas by the same functions as the two above.
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("shots", "runtime", "agreement")),
    ],
)
def test_a_study_of_a_line_of_subspaces(three_subspaces: Shell, study: str, tmp_path: Path) -> None:
    done = three_subspaces.json("study", study, "demo", "--out", tmp_path / study)
    assert done["rows"]


def test_compare_runs_methods_on_the_subspaces_and_on_masks(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    init(shell, world, tmp_path)
    for task in SKILLS[:2]:
        file = with_splits(world, tmp_path / task, task)
        shell("register", "demo", "--task", file, "--model", world.model(task))
    methods = "tsv-m,task-arithmetic,localize-and-stitch"
    rows = shell.json("compare", "demo", "--methods", methods)["methods"]
    assert {row["method"]: row["needs"] for row in rows} == {
        "tsv-m": "subspaces",
        "task-arithmetic": "subspaces",
        "localize-and-stitch": "sparse deltas",
    }


def test_a_budget_limits_the_bytes(world: World, shell: Shell, tmp_path: Path) -> None:
    init(shell, world, tmp_path, rank=1.0, budget=8_000)
    facts = add(shell, world, tmp_path, SKILLS[0])["facts"]
    assert 6_000 < facts["delta_bytes"] <= 8_000
    assert facts["budget"]["bytes"] == 8_000


def test_rank_auto_keeps_the_lowest_rank_that_recovers_the_model(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    init(shell, world, tmp_path, rank="auto", recovery=0.6, max_rank=1.0)
    file = with_splits(world, tmp_path / "task", SKILLS[0])
    done = shell("register", "demo", "--task", file, "--model", world.model(SKILLS[0]), "--json")
    found = done.json["facts"]["recovery"]
    assert found["target"] == 0.6
    assert found["reached"]
    assert found["bound"] >= 0.6
    assert found["kept"] <= max(look["kept"] for look in found["curve"])
    delta = factors_of(shell, SKILLS[0])
    largest = max(min(delta.info(n).rows_and_columns) for n in delta.names if delta.info(n).rank)
    ranks = {delta.info(name).rank for name in delta.names} - {None}
    assert ranks == {found["kept"]}
    assert found["kept"] < largest


def test_rank_auto_without_validation_rows_uses_the_default(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    init(shell, world, tmp_path, rank="auto")
    file = write_yaml(tmp_path / "task.yaml", {"task": SKILLS[0]})
    done = shell("register", "demo", "--task", file, "--model", world.model(SKILLS[0]), "--json")
    assert "no validation rows to choose a rank by: using a share of 4.2%" in done.err
    assert "recovery" not in done.json["facts"]


@pytest.mark.parametrize(
    ("method", "localize", "message"),
    [
        ("localize-and-stitch", {"mode": "subspace"}, "stitches masks"),
        ("tsv-m", {"mode": "distilled"}, "localize: {mode: subspace}, or"),
    ],
)
def test_a_method_that_cannot_use_what_a_line_keeps_is_refused(
    world: World, shell: Shell, tmp_path: Path, method: str, localize: dict[str, Any], message: str
) -> None:
    file = world.line(tmp_path / "line.yaml", retention=None, method=method, localize=localize)
    assert message in shell("init", file, code=3).err


@pytest.mark.parametrize("localize", [{"mode": "subspace"}, {"density": 1.0}])
def test_an_adapter_keeps_its_own_factors_next_to_whole_models(
    world: World, shell: Shell, tmp_path: Path, localize: dict[str, Any]
) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["query"], init_lora_weights=False)
    model = get_peft_model(AutoModel.from_pretrained(world.base), config)
    model.save_pretrained(str(tmp_path / "adapter"))
    merged: Any = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "whole")
    choice = {"method": "task-arithmetic", "localize": localize, "retention": None}
    shell("init", world.line(tmp_path / "line.yaml", **choice))
    add(shell, world, tmp_path, SKILLS[1])
    file = write_yaml(tmp_path / "task.yaml", {"task": "z"})
    done = shell("register", "demo", "--task", file, "--model", tmp_path / "adapter", "--json")
    adapter = tmp_path / "adapter" / "adapter_model.safetensors"
    assert done.json["facts"]["delta_bytes"] < 1.2 * adapter.stat().st_size
    delta = factors_of(shell, "z")
    assert {delta.info(name).rank for name in delta.names} == {3}
    stored = load_file(adapter)
    factors = delta.low_rank(delta.names[0])
    assert factors is not None
    assert any(torch.equal(factors.left, each) for each in stored.values())
    assert factors.scale == pytest.approx(5 / 3)
    assert shell.json("verify", "demo")["rebuilt"] == [1, 2]
    shell("analyze", "demo", "--densities", "1")
    # An elementwise method gives the bytes of the same adapter as a whole model.
    if "density" in localize:
        shell("export", "demo", "2", tmp_path / "one")
        shell("retire", "demo", "z", "--reason", "test")
        as_whole = write_yaml(tmp_path / "y.yaml", {"task": "y"})
        shell("register", "demo", "--task", as_whole, "--model", tmp_path / "whole")
        shell("export", "demo", "champion", tmp_path / "two")
        one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
        for name, value in one.items():
            assert torch.allclose(value, two[name], atol=1e-6), name
