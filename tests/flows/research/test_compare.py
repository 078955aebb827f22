"""Several methods on one line: the same models and data, tuned on validation rows alone."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from restitch.merging.digests import digest_file
from restitch.merging.errors import Unavailable
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.methods import registry
from restitch.merging.methods.registry import get_method, method_names
from tests.cli.test_end_to_end import plain
from tests.conftest import leave_mlflow_alone
from tests.flows.research.runs import study_runs
from tests.flows.test_localizing import with_splits
from tests.shell import Shell
from tests.worlds import World

TASKS = ("colour", "number")


@pytest.fixture(scope="module")
def shell(world: World, tmp_path_factory: pytest.TempPathFactory, empty_mlflow: Path) -> Shell:
    """A line with two members that have train, validation and test rows."""
    root = tmp_path_factory.mktemp("compare")
    (root / "home").mkdir()
    (root / "home" / "mlflow.db").write_bytes(empty_mlflow.read_bytes())
    shell = Shell(root / "home")
    with pytest.MonkeyPatch.context() as patch:
        leave_mlflow_alone(patch)
        shell("init", world.line(root / "line.yaml"))
        for task in TASKS:
            file = with_splits(world, root / task, task)
            shell("register", "demo", "--task", file, "--model", world.model(task))
    return shell


@pytest.fixture(scope="module", autouse=True)
def _few_values() -> Iterator[None]:
    """Try three values instead of ten; thresholds, which each task has its own of, stay."""
    methods: Any = registry._scan()
    with pytest.MonkeyPatch.context() as patch:
        for name, method in methods.items():
            if method.kind == "merged" and method.tunes is not None:
                setting, values = method.tunes
                few = (setting, values[:: len(values) // 2])
                patch.setitem(methods, name, replace(method, tunes=few))
        yield


@pytest.fixture(scope="module")
def tuned(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All methods, tuned; the folder holds the printed result and the plot."""
    out = tmp_path_factory.mktemp("out")
    before = shell.head_bytes()
    found: dict[str, Any] = shell.json("compare", "demo", "--tune", "--out", out)
    assert shell.head_bytes() == before, "the line stays as it is"
    assert json.loads((out / "compare.json").read_bytes()) == found
    assert (out / "accuracy-against-retention.png").read_bytes().startswith(b"\x89PNG")
    return found


def rows(found: dict[str, Any], kind: str = "methods") -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in found[kind]}


def test_every_method_is_measured_on_the_same_rows(tuned: dict[str, Any]) -> None:
    merged = {name for name in method_names() if get_method(name).kind == "merged"}
    assert set(rows(tuned)) == merged
    means = [row["mean_accuracy"] for row in tuned["methods"]]
    assert means == sorted(means, reverse=True)
    for row in tuned["methods"]:
        assert set(row["results"]) == set(TASKS)
        assert {r["data"]["digest"] for r in row["results"].values()} == {
            r["data"]["digest"] for r in tuned["methods"][0]["results"].values()
        }
        assert all(r["split"] == "test" and r["interval"] for r in row["results"].values())
        assert 0 <= row["retention"]["ratio"] <= 2
        assert row["memory"] is None or row["memory"] >= 0
        method = get_method(row["method"])
        deltas = "whole task vectors" if method.whole else "sparse deltas"
        assert row["needs"] == (f"{deltas} and train rows" if method.needs else deltas)
        assert bool(row["statistics"]) == bool(method.needs)
    assert tuned["left_out"] == {}


def test_methods_with_specialists_stand_in_their_own_table(tuned: dict[str, Any]) -> None:
    experts = rows(tuned, "experts")
    assert set(experts) == set(method_names()) - set(rows(tuned))
    of_base = rows(tuned)["averaging"]["results"]
    for row in experts.values():
        for task, one in row["results"].items():
            assert one["data"] == of_base[task]["data"]
            assert one["interval"]["low"] <= one["expert"] <= one["interval"]["high"]
            assert one["finetuned"] == of_base[task]["finetuned"]
        room = row["bytes"]
        assert room["all"] == room["shared"] + sum(room["tasks"].values()) > 0
        assert (room["shared"] == 0) == (row["method"] == "magnitude-pruning")
        assert "retention" not in row
    # What it recovers: the finetuned model says what the classes of its task are.
    assert experts["tall"]["mean_normalized"] > rows(tuned)["averaging"]["mean_normalized"]


def test_each_task_has_the_threshold_that_is_best_for_it(tuned: dict[str, Any]) -> None:
    for name in ("tall", "tall-ties"):
        row = rows(tuned, "experts")[name]
        curve = row["tuned"]["curve"]
        assert [point["value"] for point in curve] == [0.2, 0.3, 0.4, 0.5, 0.6]
        for task in TASKS:
            best = max(point["tasks"][task] for point in curve)
            first = next(point for point in curve if point["tasks"][task] == best)
            assert row["tuned"]["value"][task] == first["value"]
        assert row["settings"]["threshold"] == row["tuned"]["value"]
    assert rows(tuned, "experts")["emr"]["tuned"] is None


def test_the_lines_own_method_has_the_bytes_of_its_champion(
    shell: Shell, tuned: dict[str, Any]
) -> None:
    champion = shell.ledger().merged(shell.state().champion or 0)
    own = rows(tuned)["localize-and-stitch"]
    assert (own["patch"], own["recipe"]) == (champion.patch, champion.recipe_digest)
    assert own["results"]["colour"]["merged"] == champion.results["colour"].merged


def test_tuning_takes_the_best_value_on_validation_rows_and_the_first_of_equals(
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


def test_a_line_with_the_tuned_value_gives_the_tuned_result(
    shell: Shell, tuned: dict[str, Any], world: World, tmp_path: Path
) -> None:
    row = rows(tuned)["task-arithmetic"]
    method = {"name": "task-arithmetic", "settings": row["settings"]}
    file = world.line(tmp_path / "l.yaml", line="other", method=method, localize=None)
    shell("init", file)
    for task in TASKS:
        again = with_splits(world, tmp_path / task, task)
        shell("register", "other", "--task", again, "--model", world.model(task))
    champion = shell.ledger("other").merged(shell.state("other").champion or 0)
    assert champion.patch == row["patch"]
    assert champion.results["colour"].merged == row["results"]["colour"]["merged"]


def test_a_second_comparison_computes_nothing_and_untuned_methods_have_defaults(
    shell: Shell, tuned: dict[str, Any]
) -> None:
    again = rows(shell.json("compare", "demo", "--tune", "--methods", "ties,weighted-stitch"))
    assert set(again) == {"ties", "weighted-stitch"}
    for name, row in again.items():
        assert row["seconds"] is None, "its patch was in the store"
        assert row["tuned"] == rows(tuned)[name]["tuned"]
        assert row["patch"] == rows(tuned)[name]["patch"]
    plainly = shell.json("compare", "demo", "--methods", "task-arithmetic,tall")
    for row, default in (
        (rows(plainly)["task-arithmetic"], {"alpha": 0.4}),
        (rows(plainly, "experts")["tall"], {"threshold": 0.4}),
    ):
        assert (row["settings"], row["tuned"]) == (default, None)
    repeated = rows(shell.json("compare", "demo", "--methods", "tall"), "experts")["tall"]
    assert (repeated["seconds"], repeated["memory"]) == (None, None)
    assert repeated["bytes"] == rows(plainly, "experts")["tall"]["bytes"]


def test_the_table_has_every_method_with_its_tuned_setting(shell: Shell) -> None:
    table = plain(shell("compare", "demo", "--tune").out)
    assert ": 2 methods" not in table
    for name in ("averaging", "ties", "consensus-ta", "base", "finetuned", "emr", "of models"):
        assert name in table
    assert "colour=0." in table
    assert "(tuned)" in table


def test_a_comparison_is_a_run_in_mlflow_with_one_below_it_for_each_method(
    shell: Shell, tuned: dict[str, Any]
) -> None:
    runs = study_runs(shell)
    parent, _ = runs["methods of demo compared"]
    methods = {
        name: run
        for name, (run, _) in runs.items()
        if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }
    merged, experts = rows(tuned), rows(tuned, "experts")
    assert methods.keys() == merged.keys() | experts.keys()
    for name, row in (merged | experts).items():
        metrics, params = methods[name].data.metrics, methods[name].data.params
        assert metrics["mean/accuracy"] == pytest.approx(row["mean_accuracy"])
        for task, result in row["results"].items():
            value = result["merged" if name in merged else "expert"]
            assert metrics[f"task/{task}/accuracy"] == pytest.approx(value)
        assert params["method"] == name
        for setting in row["settings"]:
            assert f"settings.{setting}" in params
    for name, row in merged.items():
        retention = methods[name].data.metrics["retention/ratio"]
        assert retention == pytest.approx(row["retention"]["ratio"])
    for name, row in experts.items():
        assert methods[name].data.metrics["bytes/all"] == row["bytes"]["all"]
    assert parent.data.metrics == {}
    assert parent.data.params["tuned"] == "true"


def digests(folder: Path) -> dict[str, str]:
    return {path.name: digest_file(path) for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def kept(
    shell: Shell, tuned: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """The specialists of the champion with tuned thresholds, and an export of that for `colour`."""
    early = tmp_path_factory.mktemp("early") / "colour"
    refused = shell("export", "demo", "champion", early, "--task", "colour", code=3)
    assert "`restitch experts demo 2`" in refused.err
    assert shell.json("show", "demo")["specialists"] is None
    assert "specialists" not in plain(shell("history", "demo", "--versions").out)
    found = shell.json("experts", "demo", "--tune", "--out", early.parent)
    shell("export", "demo", "champion", early, "--task", "colour")
    return found, early


def test_specialists_have_the_results_of_the_comparison(
    shell: Shell, tuned: dict[str, Any], kept: tuple[dict[str, Any], Path]
) -> None:
    found, _ = kept
    compared = rows(tuned, "experts")["tall"]
    for same in ("recipe", "settings", "results", "bytes", "tuned"):
        assert found[same] == compared[same]
    assert found["bytes"]["models"] > found["bytes"]["all"]
    shown = plain(shell("experts", "demo", "--tune").out)
    for text in ("colour", "95 %", "grafted", "finetuned", "shared by all", "colour=0."):
        assert text in shown


def test_a_version_shows_its_specialists_and_their_maker(
    shell: Shell, kept: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    found, _ = kept
    shown = shell.json("show", "demo")["specialists"]
    assert (shown["line"], shown["version"]) == ("demo", 2)
    for same in ("method", "settings", "manifest"):
        assert shown[same] == found[same]
    assert shown["bytes"] == {name: found["bytes"][name] for name in ("shared", "tasks", "all")}
    assert shown["made_by"]["actor"] == found["actor"]
    assert shown["made_at"] <= found["time"].replace("+", ".999999+")
    assert shell.json("status", "demo")["lines"][0]["specialists"] == shown
    newest, first = shell.json("history", "demo", "--versions")["versions"]
    assert (newest["specialists"], first["specialists"]) == (shown, None)
    for command in (("show", "demo"), ("status", "demo"), ("history", "demo", "--versions")):
        assert "specialists for colour, number by tall, " in plain(shell(*command).out)
    shell("report", "demo", "champion", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Sizes of the stored specialists, made by tall" in page
    assert found["manifest"] in page


def test_specialists_are_a_run_in_mlflow_with_their_table_and_a_plot(
    shell: Shell, kept: tuple[dict[str, Any], Path]
) -> None:
    found, out = kept
    champion = shell.ledger().merged(2).results
    run, files = study_runs(shell)["specialists of demo 2 by tall"]
    assert files == {"experts.json", "experts.csv", "experts.png"}
    metrics = run.data.metrics
    assert metrics["mean/accuracy"] == pytest.approx(found["mean_accuracy"])
    assert metrics["bytes/all"] == found["bytes"]["all"]
    assert metrics["bytes/share_of_models"] == pytest.approx(
        found["bytes"]["all"] / found["bytes"]["models"]
    )
    for task, one in found["results"].items():
        assert metrics[f"task/{task}/accuracy"] == pytest.approx(one["expert"])
        assert metrics[f"task/{task}/low"] == pytest.approx(one["interval"]["low"])
        assert metrics[f"task/{task}/normalized"] == pytest.approx(one["normalized"])
        assert metrics[f"task/{task}/merged"] == pytest.approx(champion[task].merged)
        assert metrics[f"task/{task}/bytes"] == found["bytes"]["tasks"][task]
    assert run.data.params["manifest"] == found["manifest"]
    assert run.data.tags["mlflow.user"] == found["actor"]
    folder = out.parent
    assert json.loads((folder / "experts.json").read_bytes()) == found
    assert (folder / "experts.csv").read_text().startswith("task,accuracy,low,high,normalized,")
    assert (folder / "experts.png").read_bytes().startswith(b"\x89PNG")


def test_an_exported_specialist_is_base_plus_mask_times_multi_task_vector(
    world: World, kept: tuple[dict[str, Any], Path]
) -> None:
    found, out = kept
    base, own, made = (Checkpoint.open(p) for p in (world.base, world.model("colour"), out))
    other = Checkpoint.open(world.model("number"))
    threshold = found["settings"]["threshold"]["colour"]
    changed = 0
    for name in base.names:
        before = base.tensor(name)
        if base.info(name).dtype.is_floating_point and "encoder.layer" in name:
            wide = before.double()
            vectors = [wide * -1 + model.tensor(name).double() for model in (own, other)]
            together = vectors[0] + vectors[1]
            mask = vectors[0].abs() >= threshold * (together - vectors[0]).abs()
            before = torch.where(mask, (wide + together).to(before.dtype), before)
            changed += int(mask.sum())
        assert torch.equal(made.tensor(name), before)
    assert changed
    description = json.loads((out / "restitch.json").read_text())
    assert (description["task"], description["specialists"]["method"]) == ("colour", ["tall", 1])
    assert "demo, version 2: colour" in (out / "README.md").read_text()


def test_gc_removes_comparisons_but_no_specialist(
    shell: Shell, tuned: dict[str, Any], kept: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    shell("gc", "--older-than", "0s", "--yes")
    assert shell.json("verify", "--deep")["intact"]
    again = rows(shell.json("compare", "demo", "--methods", "averaging"))["averaging"]
    assert again["seconds"] is not None, "it was computed again"
    assert again["patch"] == rows(tuned)["averaging"]["patch"]
    shell("export", "demo", "champion", tmp_path / "colour", "--task", "colour")
    assert digests(tmp_path / "colour") == digests(kept[1])


def test_a_version_has_one_set_of_specialists(
    shell: Shell, kept: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    refused = shell("experts", "demo", "--method", "emr", code=3).err
    assert "has other specialists" in refused
    assert "--replace" in refused
    found = shell.json("experts", "demo", "--method", "emr", "--replace")
    shell("export", "demo", "champion", tmp_path / "emr", "--task", "colour")
    assert digests(tmp_path / "emr") != digests(kept[1])
    room = shell.json("gc", "--older-than", "0s", "--yes")
    assert room["kinds"]["experts"]["objects"] == 1, "the list of those that were replaced"
    assert shell.json("experts", "demo", "--method", "emr")["bytes"] == found["bytes"]
    shell.json("experts", "demo", "--tune", "--replace")


def test_specialists_that_gc_removed_meanwhile_are_not_named(
    shell: Shell, kept: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def removed(*_: object) -> None:
        raise Unavailable("what this act names was removed")

    assert len(list((shell.home / "store/keys/specialists").iterdir())) == 1
    with monkeypatch.context() as patched:
        patched.setattr("restitch.flows.research.experts.check_not_deleted", removed)
        shell("experts", "demo", "--method", "emr", "--replace", code=6)
    assert not list((shell.home / "store/keys/specialists").iterdir())
    assert shell.json("experts", "demo", "--tune")["manifest"] == kept[0]["manifest"]


def test_damaged_specialists_are_named_and_restored(
    shell: Shell, kept: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    store = shell.home / "store"
    manifest = store / "blobs" / kept[0]["manifest"]
    parts = json.loads(manifest.read_bytes())
    shared, mask, altered = (
        store / "blobs" / part["blob"]
        for part in (parts["shared"], parts["tasks"]["colour"], parts["tasks"]["number"])
    )
    whole = {path: path.read_bytes() for path in (shared, mask, altered, manifest)}
    shared.write_bytes(whole[shared][:-1])
    mask.unlink()
    altered.write_bytes(whole[altered][:-1] + bytes([whole[altered][-1] ^ 1]))
    found = shell.json("verify", "--deep", code=7)
    by_digest = {one["object"].rpartition("/")[2]: one for one in found["store"]["damaged"]}
    assert set(by_digest) == {shared.name, mask.name, altered.name}
    for path, task in ((mask, "colour"), (altered, "number")):
        assert by_digest[path.name]["what"] == [f"the specialist of {task} of version 2 (demo)"]
    assert (
        "damaged"
        in shell("export", "demo", "champion", tmp_path / "x", "--task", "number", code=7).err
    )
    manifest.unlink()
    shell.json("verify", "--deep", "--repair")
    assert {path: path.read_bytes() for path in whole} == whole
    assert shell.json("verify", "--deep")["intact"]


def test_a_damaged_key_of_specialists_is_restored_only_if_one_set_fits(
    shell: Shell, kept: tuple[dict[str, Any], Path]
) -> None:
    (key,) = (shell.home / "store/keys/specialists").iterdir()
    before = shell.json("show", "demo")["specialists"]
    several = shell.json("experts", "demo", "--method", "emr", "--replace")["method"]
    key.write_bytes(b"{")
    (mended,) = shell.json("verify", "--deep", "--repair")["store"]["damaged"]
    assert "run `restitch experts demo 2` to name them again" in mended["outcome"], several
    shell.json("experts", "demo", "--tune")
    shell("gc", "--older-than", "0s", "--yes")
    key.write_bytes(b"{")
    (mended,) = shell.json("verify", "--deep", "--repair")["store"]["damaged"]
    assert mended["outcome"] == "written again: those of demo 2 by tall"
    after = shell.json("show", "demo")["specialists"]
    for same in ("manifest", "method", "settings", "bytes"):
        assert after[same] == before[same]


def test_wrong_methods_tasks_and_lines_are_refused(
    shell: Shell, world: World, tmp_path: Path
) -> None:
    done = shell("compare", "demo", "--methods", "tie", code=3)
    assert "did you mean 'ties'" in done.err
    done = shell("experts", "demo", "--method", "ties", code=3)
    assert "tall or tall-ties" in done.err
    done = shell("export", "demo", "champion", tmp_path / "x", "--task", "animal", code=3)
    assert "holds no task animal" in done.err
    line = world.line(tmp_path / "e.yaml", line="e", method="tall", localize=None)
    assert "gives no merged model" in shell("init", line, code=3).err
    shell("init", world.line(tmp_path / "empty.yaml", line="empty"))
    assert "no member to merge" in shell("compare", "empty", code=3).err


def test_tuning_without_validation_rows_names_the_task(
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
