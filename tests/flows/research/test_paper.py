"""The study of a paper: its plan, its table, and what happens after an interruption."""

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from restitch.flows.research import paper as paper_flow
from restitch.registry.mlflow.sync import MlflowProjection
from restitch.registry.specs.paper import load_paper
from tests.conftest import NewHome
from tests.hub_server import FakeHub, fake_hub
from tests.paper_hub import serve_paper
from tests.shell import Shell
from tests.worlds import SKILLS, World, write_yaml

PUBLISHED = [
    {
        "source": "on these models",
        "rows": [
            {"name": "zero-shot", "method": "base", "benchmark": 63.3},
            {"name": "finetuned", "method": "finetuned", "mean": 90.0},
            {
                "name": "TA",
                "method": "task-arithmetic",
                "mean": 68.0,
                "settings": {"alpha": 0.25},
            },
            {"name": "RegMean++", "mean": 84.4},
        ],
    },
    {"source": "others", "same_models": False, "rows": [{"name": "TA", "mean": 70.8}]},
]
METHODS = "task-arithmetic,averaging,tall"


def local_paper(world: World, folder: Path, **changes: Any) -> Path:
    """A paper file with the models and data sets of a world in folders."""
    tasks = {name: yaml.safe_load(world.task(name).read_text()) for name in SKILLS}
    general = write_yaml(
        folder / "tasks" / "general.yaml",
        yaml.safe_load((world.root / "general.yaml").read_text()),
    )
    values = {
        "about": "three small models",
        "base": str(world.base),
        "family": "clip",
        "models": str(world.root / "models"),
        "retention": str(general.relative_to(folder)),
        "retention_rows": 60,
        "tasks": {name: {"rows": 60, "task": task} for name, task in tasks.items()},
        "published": PUBLISHED,
        "notes": ["mind the noise"],
    }
    return write_yaml(folder / "small.yaml", {**values, **changes})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A shorter pass, and no MLflow."""
    monkeypatch.setattr("restitch.modeling.short_pass._SECONDS", 0.01)
    monkeypatch.setattr(MlflowProjection, "repair", lambda *_, **__: 0)
    monkeypatch.setattr(MlflowProjection, "show_study", lambda *_, **__: None)
    return monkeypatch


def test_a_small_paper_from_plan_to_table(
    clip_world: World, new_home: NewHome, tmp_path: Path, quick: pytest.MonkeyPatch
) -> None:
    shell, file = new_home("paper"), local_paper(clip_world, tmp_path)
    options = ("study", "paper", file, "--methods", METHODS)

    plan = shell.json(*options, "--plan")
    assert set(plan["to_register"]) == set(SKILLS)
    # Base, finetuned, two deltas and three methods on each task; the base and two methods.
    assert plan["rows"] == 3 * 60 * (4 + 3) + 60 * (1 + 2)
    assert plan["row_seconds"] > 0
    sizes = {part["what"]: part["size"] for part in plan["disk"]}
    assert sizes["whole task vectors"] == 2 * sizes["merged results"] * 3 // 4
    assert "Fisher diagonals" not in sizes
    assert sizes["finetuned models"] == 0  # folders are read in place
    assert shell.head_bytes("small") is None
    refused = shell(*options, code=2)
    assert "disk space: at most" in refused.err
    assert "--yes" in refused.err
    assert shell.head_bytes("small") is None

    found = shell.json(*options, "--yes", "--out", tmp_path / "out")
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows)[:4] == ["zero-shot", "finetuned", "TA", "RegMean++"]
    assert set(rows) == {"zero-shot", "finetuned", "TA", "RegMean++", "averaging", "tall"}
    assert rows["finetuned"]["mean"] == 100
    assert (rows["zero-shot"]["published_benchmark"], rows["zero-shot"]["benchmark"]) == (63.3, 100)
    assert rows["TA"]["published"] == 68.0
    assert rows["TA"]["settings"] == "alpha 0.25"
    assert rows["RegMean++"]["mean"] is None
    assert {name: row["kind"] for name, row in rows.items()}["tall"] == "experts"
    assert found["elsewhere"] == {"others": [{"name": "TA", "published": 70.8}]}
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files >= {"paper.csv", "paper.json", "paper.md", "accuracy-against-retention.png"}
    table = (tmp_path / "out" / "paper.md").read_text()
    assert re.search(r"^\| TA \| 68\.0 \| \d+\.\d .*alpha 0\.25 \|$", table, re.MULTILINE)
    compared = json.loads((tmp_path / "out" / "compare.json").read_text())
    means = {row["method"]: row["mean_accuracy"] for row in compared["methods"]}
    assert rows["TA"]["mean"] == pytest.approx(100 * means["task-arithmetic"])

    # Again: nothing is registered, nothing is merged, and a changed task is registered again.
    quick.setattr(paper_flow, "register", None)
    assert shell.json(*options, "--plan")["registered"] == list(SKILLS)
    shown = shell(*options, "--yes", "--out", tmp_path / "again")
    assert "mind the noise" in shown.out
    assert "not to be compared" in shown.out
    assert "colour is registered (1 of 3)" in shown.err
    again = json.loads((tmp_path / "again" / "compare.json").read_text())
    assert all(row["seconds"] is None for row in (*again["methods"], *again["experts"]))
    values = yaml.safe_load(file.read_text())
    values["tasks"]["colour"]["task"]["head"]["templates"] = ["{}"]
    write_yaml(file, values)
    assert list(shell.json(*options, "--plan")["to_register"]) == ["colour"]


@pytest.mark.usefixtures("quick")
def test_models_that_cannot_join_are_named_together(
    clip_world: World, new_home: NewHome, tmp_path: Path
) -> None:
    shell, file = new_home("refused"), local_paper(clip_world, tmp_path)
    values = yaml.safe_load(file.read_text())
    values["tasks"]["number"]["task"]["head"]["labels"] = ["five", "six"]
    values["tasks"]["nothing"] = values["tasks"]["animal"]
    del values["tasks"]["animal"]
    values["tasks"]["nothing"]["task"]["task"] = "nothing"
    write_yaml(file, values)
    refused = shell("study", "paper", file, "--yes", "--no-retention", code=4).err
    assert "2 of 3 models of small cannot join" in refused
    assert "number: " in refused
    assert "nothing: " in refused
    assert shell.json("study", "paper", file, "--plan")["registered"] == ["colour"]


@pytest.fixture
def hub() -> Any:
    with fake_hub() as served:
        yield served


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name",
    ["clip-b32-20", "clip-l14-8", "roberta-12", "gpt2-7", "flan-t5-8", "mergebench-llama-3b"],
)
def test_the_other_papers_run_on_stand_ins(hub: FakeHub, name: str, tmp_path: Path) -> None:
    """All data sets and all families, with a method of each kind."""
    models = ("--models", "me/roberta-{task}") if name == "roberta-12" else ()
    serve_paper(hub, load_paper(name, models=models[1] if models else None), tmp_path)
    study = ("study", "paper", name, *models, "--yes", "--out", tmp_path / "out")
    methods = "averaging,localize-and-stitch,tall"
    shell, variables = Shell(tmp_path / "home"), hub.environment(tmp_path / "cache")
    done = shell.start(*study, "--methods", methods, environment=variables)
    _, err = done.communicate(timeout=800)
    assert done.returncode == 0, err
    found = json.loads((tmp_path / "out" / "paper.json").read_text())
    rows = {row["method"]: row for row in found["rows"]}
    assert len(found["members"]) == len(load_paper(name, models="a/{task}").tasks)
    assert ("snli: 3 test rows have no label" in err) == (name == "roberta-12")
    for method in methods.split(","):
        of_images = name.startswith("clip")
        assert (rows[method]["mean"] is not None) == (name != "mergebench-llama-3b")
        assert (rows[method]["retention"] is not None) == (of_images and method != "tall")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_study_of_eight_image_tasks(hub: FakeHub, tmp_path: Path) -> None:
    """From the plan to the table on stand-ins, killed once while it registers."""
    serve_paper(hub, load_paper("clip-b32-8"), tmp_path)
    variables = hub.environment(tmp_path / "cache")
    shell = Shell(tmp_path / "home")
    study = ("study", "paper", "clip-b32-8")

    # Models and data sets that are gone are named before anything is fetched.
    gone = [("models", "tanganke/clip-vit-base-patch32_svhn"), ("datasets", "tanganke/dtd")]
    kept = {key: hub.commits.pop(key) for key in gone}
    refused = shell.process(*study, "--plan", environment=variables, code=3)
    assert "2 of the models and data sets" in refused.err
    assert all(name in refused.err for _, name in gone)
    hub.commits.update(kept)

    with shell.start(*study, "--yes", environment=variables) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "registering eurosat" in line:
                os.kill(process.pid, signal.SIGKILL)
                break
    before = shell.state("clip-b32-8").tasks
    assert {"sun397", "stanford-cars", "resisc45"} <= set(before)

    done = shell.start(*study, "--yes", "--out", tmp_path / "out", environment=variables)
    _, err = done.communicate(timeout=900)
    assert done.returncode == 0, err
    assert "stanford-cars is registered (2 of 8)" in err
    after = shell.state("clip-b32-8").tasks
    assert all(after[name].versions.keys() == {1} for name in after)
    assert (
        after["resisc45"].versions[1].registered_at == before["resisc45"].versions[1].registered_at
    )
    found = json.loads((tmp_path / "out" / "paper.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert (rows["TSV-M"]["published"], rows["TSV-M"]["method"]) == (83.1, "tsv-m")
    assert rows["zero-shot"]["benchmark"] > 0
    assert rows["finetuned"]["mean"] > rows["zero-shot"]["mean"]
    assert all(row["mean"] is not None for name, row in rows.items() if name != "RegMean++")
    assert all(row["retention"] is not None for row in found["rows"] if row["kind"] == "merged")
    assert (tmp_path / "out" / "accuracy-against-retention.png").stat().st_size > 10_000

    # All is done: nothing is merged again.
    started = time.monotonic()
    shell.process(*study, "--yes", "--out", tmp_path / "again", environment=variables)
    assert time.monotonic() - started < 240
    again = json.loads((tmp_path / "again" / "compare.json").read_text())
    assert all(row["seconds"] is None for row in (*again["methods"], *again["experts"]))
