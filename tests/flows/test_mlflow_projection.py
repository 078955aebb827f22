"""The projection of a line to MLflow: complete, under fixed names, and without duplicates."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest

from restitch.registry.home import Home
from restitch.registry.mlflow.connection import connect
from tests.conftest import Three
from tests.shell import Shell
from tests.worlds import SKILLS, World

if TYPE_CHECKING:
    from mlflow import MlflowClient


def client_of(shell: Shell) -> "MlflowClient":
    return connect(Home(shell.home))


def runs_of(client: "MlflowClient", experiment: str) -> list[Any]:
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id], order_by=["attributes.start_time ASC"]))


@pytest.fixture(scope="module")
def client(three: Three) -> "MlflowClient":
    return client_of(three.shell)


def test_each_merged_version_is_a_run_with_its_measurements(
    three: Three, client: "MlflowClient"
) -> None:
    runs = runs_of(client, "demo")
    assert [run.data.params["version"] for run in runs] == ["1", "2", "3"]
    ledger = three.shell.ledger()
    for version, run in enumerate(runs, 1):
        record = ledger.merged(version)
        kept = record.retention
        assert kept is not None
        expected = {
            "retention/accuracy": kept.value,
            "retention/top5": kept.more["top5"],
            "retention/base_accuracy": kept.base,
            "retention/ratio": kept.ratio,
            "mean/accuracy": record.mean_accuracy,
            "mean/normalized": record.mean_normalized,
        }
        for task, result in record.results.items():
            expected[f"task/{task}/accuracy"] = result.merged
            expected[f"task/{task}/normalized"] = result.normalized
        metrics = run.data.metrics
        assert {name: metrics[name] for name in expected} == pytest.approx(expected)
        for name in expected:
            (point,) = client.get_metric_history(run.info.run_id, name)
            assert point.step == version
        assert run.info.status == "FINISHED"
        assert run.data.params["recipe"] == record.recipe_digest


def test_runs_are_found_by_mlflow_itself(three: Three) -> None:
    import mlflow

    with patch.dict(os.environ):  # where MLflow writes down the address
        mlflow.set_tracking_uri(f"sqlite:///{three.shell.home / 'mlflow.db'}")
        found = mlflow.search_runs(
            experiment_names=["demo"], filter_string="metrics.`retention/ratio` > 0"
        )
        mlflow.set_tracking_uri(None)
    assert len(found) == 3
    assert "metrics.task/colour/accuracy" in found.columns


def test_each_act_is_a_short_finished_run(three: Three, client: "MlflowClient") -> None:
    runs = runs_of(client, "demo.audit")
    acts = three.shell.acts()
    by_digest = {run.data.tags["restitch.digest"]: run for run in runs}
    assert by_digest.keys() == {act.digest for act in acts}
    for act in acts:
        run = by_digest[act.digest]
        assert run.info.status == "FINISHED"
        assert (run.data.params["kind"], run.data.params["actor"]) == (act.kind, act.actor)


def test_each_finetuned_model_is_a_registered_version(three: Three, client: "MlflowClient") -> None:
    line_state = three.shell.state()
    for task in SKILLS:
        (version,) = client.search_model_versions(f"name = 'demo.{task}'")
        model = line_state.tasks[task].versions[1]
        assert version.tags["restitch.digest"] == model.model.weights
        assert version.tags["restitch.base"] == line_state.base.weights
        assert version.tags["restitch.state"] == "ready"


def test_aliases_follow_the_line_s_state(three: Three, client: "MlflowClient") -> None:
    versions = client.search_model_versions("name = 'demo'")
    numbers = {int(v.tags["restitch.version"]): int(v.version) for v in versions}
    assert sorted(numbers) == [1, 2, 3]
    aliases = client.get_registered_model("demo").aliases
    assert {k: int(v) for k, v in aliases.items()} == {"champion": numbers[3]}


def image(client: "MlflowClient") -> dict[str, Any]:
    """All that MLflow holds, to compare."""
    runs = [
        (run.info.run_id, run.info.status, sorted(run.data.metrics.items()), run.data.params)
        for experiment in client.search_experiments()
        for run in client.search_runs([experiment.experiment_id])
    ]
    versions = [
        (v.name, int(v.version), sorted(v.tags.items())) for v in client.search_model_versions()
    ]
    aliases = {m.name: dict(m.aliases) for m in client.search_registered_models()}
    return {"runs": sorted(runs), "versions": sorted(versions), "aliases": aliases}


def test_a_second_projection_duplicates_nothing(
    three: Three, client: "MlflowClient", world: World
) -> None:
    before = image(client)
    three.shell("remerge", "demo")
    three.shell("remerge", "demo", "--force")
    three.shell.add(world, "colour")
    assert image(client) == before


def test_a_candidate_and_a_champion_have_their_aliases(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    shell("init", world.line(tmp_path / "line.yaml", gates={"min_retention": 0.25}))
    shell.add(world, "colour")
    shell.add(world, "wreck", code=5)
    client = client_of(shell)
    numbers = {
        int(v.tags["restitch.version"]): int(v.version)
        for v in client.search_model_versions("name = 'demo'")
    }
    aliases = {k: int(v) for k, v in client.get_registered_model("demo").aliases.items()}
    assert aliases == {"champion": numbers[1]}, "a version that failed is no candidate"
    (held,) = client.search_model_versions("name = 'demo.wreck'")
    assert held.tags["restitch.state"] == "held"
    assert "min_retention" in held.tags["restitch.reason"]
    shell("init", world.line(tmp_path / "line.yaml", gates={"min_retention": 0.01}))
    shell("remerge", "demo")
    aliases = {k: int(v) for k, v in client.get_registered_model("demo").aliases.items()}
    champion = client.get_model_version_by_alias("demo", "champion")
    assert list(aliases) == ["champion"]
    assert champion.tags["restitch.version"] == "3"
    shell("pin", "demo")
    shell.add(world, "number")
    waits = client.get_model_version_by_alias("demo", "candidate")
    assert (waits.tags["restitch.version"], waits.tags["restitch.role"]) == ("4", "candidate")
    (held,) = client.search_model_versions("name = 'demo.wreck'")
    assert (held.tags["restitch.state"], held.tags["restitch.reason"]) == ("ready", "")


def test_a_remerge_completes_what_mlflow_missed(
    world: World, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from restitch.merging.errors import Unavailable
    from restitch.registry.mlflow.sync import MlflowProjection

    def away(*_: object, **__: object) -> int:
        raise Unavailable("MLflow is away")

    with monkeypatch.context() as patched:
        patched.setattr(MlflowProjection, "repair", away)
        done = shell("init", world.line(tmp_path / "line.yaml"))
        assert "MLflow is away" in done.err
        shell.add(world, "colour")
    assert shell.state().champion == 1, "the store is the truth"
    assert shell.json("remerge", "demo")["action"] == "unchanged"
    client = client_of(shell)
    assert [run.data.params["version"] for run in runs_of(client, "demo")] == ["1"]
    assert len(runs_of(client, "demo.audit")) == len(shell.acts())


def files_below(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# Two commands in one process, which takes seconds to start, and all libraries.
INIT_AND_REGISTER = """
import sys
from restitch.cli.main import main

line, *files = sys.argv[1:]
for command in (["init", line], ["register", "demo", *files]):
    sys.argv[1:] = command
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
import boto3, datasets, huggingface_hub, mlflow, prefect, transformers
"""


def test_nothing_is_written_outside_of_the_home(world: World, tmp_path: Path) -> None:
    """In a process of its own, from another folder, with an empty home of the user."""
    user, here = tmp_path / "user", tmp_path / "here"
    user.mkdir()
    here.mkdir()
    libraries = ("PREFECT_", "MLFLOW_", "HF_", "XDG_", "TORCH_", "MPL")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(libraries)}
    shell = Shell(tmp_path / "state")
    line = world.line(tmp_path / "line.yaml")
    before = files_below(world.root)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = {
        **kept,
        "HOME": str(user),
        "TMPDIR": str(temporary),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    files = ("--task", world.task("colour"), "--model", world.model("colour"))
    done = shell.python(INIT_AND_REGISTER, line, *files, environment=environment, cwd=here)
    assert "INFO" not in done.err
    assert files_below(user) == []
    assert files_below(here) == []
    assert files_below(temporary) == []
    assert files_below(world.root) == before
    assert (shell.home / "mlflow.db").is_file()
    assert not list(shell.home.rglob("mlruns")), "never the file store"
    assert not list(shell.home.rglob("meta.yaml"))
