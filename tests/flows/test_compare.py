"""Several methods on one line: the same models and data, tuned on validation rows alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from merging.methods import get_method
from tests.cli.test_end_to_end import plain
from tests.flows.test_localizing import with_splits
from tests.shell import Shell
from tests.worlds import World

TASKS = ("colour", "number")


@pytest.fixture(scope="module")
def shell(world: World, tmp_path_factory: pytest.TempPathFactory, empty_mlflow: Path) -> Shell:
    """A line with two members whose rows are cut into train, validation and test."""
    root = tmp_path_factory.mktemp("compare")
    (root / "home").mkdir()
    (root / "home" / "mlflow.db").write_bytes(empty_mlflow.read_bytes())
    shell = Shell(root / "home")
    shell("init", world.line(root / "line.yaml"))
    for task in TASKS:
        file = with_splits(world, root / task, task)
        shell("register", "demo", "--task", file, "--model", world.model(task))
    return shell


@pytest.fixture(scope="module")
def tuned(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All methods, tuned; what was written to the folder is beside what was printed."""
    out = tmp_path_factory.mktemp("out")
    before = shell.head_bytes()
    found: dict[str, Any] = shell.json("compare", "demo", "--tune", "--out", out)
    assert shell.head_bytes() == before, "the line stays as it is"
    assert json.loads((out / "compare.json").read_bytes()) == found
    assert (out / "accuracy-against-retention.png").read_bytes().startswith(b"\x89PNG")
    return found


def rows(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in found["methods"]}


def test_every_method_is_measured_on_the_same_rows(tuned: dict[str, Any]) -> None:
    from merging.methods import method_names

    assert set(rows(tuned)) == set(method_names())
    means = [row["mean_accuracy"] for row in tuned["methods"]]
    assert means == sorted(means, reverse=True)
    for row in tuned["methods"]:
        assert set(row["results"]) == set(TASKS)
        assert {r["data"]["digest"] for r in row["results"].values()} == {
            r["data"]["digest"] for r in tuned["methods"][0]["results"].values()
        }
        assert all(r["split"] == "test" and r["interval"] for r in row["results"].values())
        assert 0 <= row["retention"]["ratio"] <= 2
        method = get_method(row["method"])
        deltas = "whole task vectors" if method.whole else "sparse deltas"
        assert row["needs"] == (f"{deltas} and train rows" if method.needs else deltas)
        assert bool(row["statistics"]) == bool(method.needs)
    assert tuned["left_out"] == {}


def test_the_lines_own_method_has_the_bytes_of_its_champion(
    shell: Shell, tuned: dict[str, Any]
) -> None:
    champion = shell.ledger().merged(shell.head().champion or 0)
    own = rows(tuned)["localize-and-stitch"]
    assert (own["patch"], own["recipe"]) == (champion.patch, champion.recipe_digest)
    assert own["results"]["colour"]["merged"] == champion.results["colour"].merged


def test_the_best_value_on_validation_rows_is_taken_the_first_of_equals(
    tuned: dict[str, Any],
) -> None:
    for row in tuned["methods"]:
        if get_method(row["method"]).tunes is None:
            assert row["tuned"] is None
            continue
        curve = row["tuned"]["curve"]
        best = max(point["mean"] for point in curve)
        first = next(point for point in curve if point["mean"] == best)
        assert row["settings"][row["tuned"]["setting"]] == row["tuned"]["value"] == first["value"]
        for point in curve:
            assert point["mean"] == pytest.approx(sum(point["tasks"].values()) / len(TASKS))
        assert set(row["tuned"]["rows"]) == set(TASKS)


def test_what_was_tuned_is_what_a_line_with_that_value_gives(
    shell: Shell, tuned: dict[str, Any], world: World, tmp_path: Path
) -> None:
    row = rows(tuned)["task-arithmetic"]
    method = {"name": "task-arithmetic", "settings": row["settings"]}
    file = world.line(tmp_path / "l.yaml", line="other", method=method, localize=None)
    shell("init", file)
    for task in TASKS:
        again = with_splits(world, tmp_path / task, task)
        shell("register", "other", "--task", again, "--model", world.model(task))
    champion = shell.ledger("other").merged(shell.head("other").champion or 0)
    assert champion.patch == row["patch"]
    assert champion.results["colour"].merged == row["results"]["colour"]["merged"]


def test_again_it_makes_nothing_anew_and_without_tuning_it_takes_the_defaults(
    shell: Shell, tuned: dict[str, Any]
) -> None:
    again = rows(shell.json("compare", "demo", "--tune", "--methods", "ties,restitch"))
    assert set(again) == {"ties", "restitch"}
    for name, row in again.items():
        assert row["seconds"] is None, "its patch was in the store"
        assert row["tuned"] == rows(tuned)[name]["tuned"]
        assert row["patch"] == rows(tuned)[name]["patch"]
    plainly = rows(shell.json("compare", "demo", "--methods", "task-arithmetic"))
    assert plainly["task-arithmetic"]["settings"] == {"alpha": 0.4}
    assert plainly["task-arithmetic"]["tuned"] is None


def test_the_table_has_every_method_with_its_tuned_setting(shell: Shell) -> None:
    table = plain(shell("compare", "demo", "--tune").out)
    assert "2 methods" not in table
    for name in ("averaging", "ties", "consensus-ta", "base", "finetuned"):
        assert name in table
    assert "(tuned)" in table


def test_it_is_a_run_in_mlflow(shell: Shell, tuned: dict[str, Any]) -> None:
    from registry.catalog import Catalog
    from registry.home import Home

    with shell.inside():
        client = Catalog(Home.from_environment()).client
        experiment = client.get_experiment_by_name("demo.studies")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id], order_by=["start_time"])
    first = runs[0]
    assert first.info.run_name == "methods of demo compared"
    for name, row in rows(tuned).items():
        assert first.data.metrics[f"{name}/mean_accuracy"] == pytest.approx(row["mean_accuracy"])
        assert first.data.metrics[f"{name}/retention"] == pytest.approx(row["retention"]["ratio"])


def test_what_it_made_can_be_cleared_away(shell: Shell, tuned: dict[str, Any]) -> None:
    shell("gc", "--older-than", "0s", "--yes")
    assert shell.json("verify", "--deep")["intact"]
    again = rows(shell.json("compare", "demo", "--methods", "averaging"))["averaging"]
    assert again["seconds"] is not None, "it was made anew"
    assert again["patch"] == rows(tuned)["averaging"]["patch"]


def test_mistakes_are_told(shell: Shell, world: World, tmp_path: Path) -> None:
    done = shell("compare", "demo", "--methods", "tie", code=3)
    assert "did you mean 'ties'" in done.err
    shell("init", world.line(tmp_path / "empty.yaml", line="empty"))
    assert "no member to merge" in shell("compare", "empty", code=3).err


def test_without_rows_to_tune_on_it_says_for_which_task(
    new_home: Any, world: World, tmp_path: Path
) -> None:
    shell = new_home("bare")
    shell("init", world.line(tmp_path / "line.yaml"))
    shell.add(world, "colour")
    done = shell("compare", "demo", "--tune", "--methods", "ties", code=3)
    assert "none for colour" in done.err
    assert "without --tune" in done.err
    found = shell.json("compare", "demo", "--methods", "ties")
    assert found["methods"][0]["settings"]["alpha"] == 1.0
