"""Lines whose merge method needs statistics of its members."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from restitch.cli.render.formats import size
from restitch.merging.errors import BadInput, Unavailable
from restitch.merging.methods.registry import get_method
from restitch.merging.recipe import Recipe
from restitch.modeling.part_by_part import PartByPart, Pass
from restitch.registry.ledger.records import MergedRecord
from restitch.registry.maintenance.inventory import take_inventory
from restitch.tasks.inputs import live_base
from tests.conftest import NewHome
from tests.flows.test_localizing import with_splits
from tests.shell import Shell
from tests.worlds import World

pytestmark = pytest.mark.usefixtures("without_mlflow")

REMEDY = "restore it from the deltas and train rows of colour (other hardware may give other bytes)"
SETTINGS: dict[str, dict[str, Any]] = {"adamerging": {"steps": 3, "batch": 4}}


def line(shell: Shell, world: World, folder: Path, method: str, **localize: Any) -> Shell:
    given = {"name": method, "settings": SETTINGS.get(method, {})}
    kept = {"mode": "dataless", "density": 1, "shots": 4, **localize}
    shell("init", world.line(folder / "line.yaml", method=given, localize=kept, retention=None))
    return shell


def add(shell: Shell, world: World, folder: Path, task: str) -> None:
    file = with_splits(world, folder / task, task)
    shell("register", "demo", "--task", file, "--model", world.model(task))


def record(shell: Shell) -> MergedRecord:
    return shell.ledger().merged(shell.state().champion or 0)


def keys(shell: Shell, kind: str) -> dict[str, bytes]:
    store = shell.ledger().objects.store
    return {name: store.read(name) for name in store.list(f"keys/{kind}")}


def blob(shell: Shell, digest: str) -> Path:
    return shell.ledger().objects.store.local_path(f"blobs/{digest}")


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("fisher-merging", "fisher"),
        ("regmean", "gram"),
        ("adamerging", "coefficients"),
        ("mats", "gradient-gram"),
    ],
)
def test_the_order_of_joining_does_not_matter_and_versions_are_rebuilt_from_recipes(
    world: World, new_home: NewHome, tmp_path: Path, method: str, kind: str
) -> None:
    shell = line(new_home("one"), world, tmp_path, method)
    add(shell, world, tmp_path, "colour")
    before = keys(shell, kind)
    add(shell, world, tmp_path, "number")
    together = shell.patch_bytes()
    named = Recipe.from_json(record(shell).recipe).other
    if kind == "coefficients":
        assert set(named) == {kind}
    else:
        kinds = get_method(method).needs
        assert kind in kinds
        assert set(named) == {f"{one}/{task}" for one in kinds for task in ("colour", "number")}
        assert len(before) == 1
        assert len(keys(shell, kind)) == 2, "the one that joined cost its own"
    assert before.items() <= keys(shell, kind).items()
    assert shell.json("verify", "demo")["rebuilt"] == [1, 2]
    shell.check_settled()
    shell("retire", "demo", "colour", "--reason", "withdrawn")

    other = line(new_home("other"), world, tmp_path, method)
    add(other, world, tmp_path, "number")
    assert shell.patch_bytes() == other.patch_bytes(), "as if it had never joined"
    add(other, world, tmp_path, "colour")
    assert other.patch_bytes() == together


def test_statistics_of_a_version_survive_gc_and_are_repaired_when_damaged(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    line(shell, world, tmp_path, "fisher-merging")
    add(shell, world, tmp_path, "colour")
    (digest,) = record(shell).statistics.values()
    (key,) = keys(shell, "fisher")
    shell("gc", "--older-than", "0s", "--yes")
    assert key in keys(shell, "fisher")
    assert shell.json("verify", "demo")["rebuilt"] == [1]

    data = blob(shell, digest).read_bytes()
    blob(shell, digest).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    findings = shell.json("verify", "demo", code=7)["findings"]
    assert "the statistics of colour 1" in {one["subject"] for one in findings}
    found = shell.json("verify", "--deep", code=7)
    (damaged,) = found["store"]["damaged"]
    assert set(damaged["what"]) == {
        "the fisher/colour of version 1 (demo)",
        "the fisher/colour of colour 1 (demo)",
        "the fisher of act 3 (demo)",
    }
    assert damaged["remedy"] == REMEDY
    (mended,) = shell.json("verify", "demo", "--repair")["store"]["damaged"]
    assert mended["mended"]
    assert blob(shell, digest).read_bytes() == data

    shell.ledger().objects.store.local_path(key).write_bytes(b"{")
    (mended,) = shell.json("verify", "demo", "--repair")["store"]["damaged"]
    assert mended["outcome"] == "written again from the recipe of version 1"
    inventory = take_inventory(shell.ledger().objects)
    assert inventory.keys[key].blob == digest
    shell.check_settled()


def test_statistics_are_measured_at_onboarding_and_a_remerge_only_combines_them(
    world: World, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line(shell, world, tmp_path, "regmean")
    file = with_splits(world, tmp_path / "colour", "colour")
    files = ("--task", file, "--model", world.model("colour"))
    facts = shell.json("register", "demo", *files, "--no-remerge")["facts"]
    output = shell("register", "demo", *files, "--no-remerge").out
    assert f", gram {size(facts['statistics_bytes'])}, " in output
    (key,) = keys(shell, "gram")
    digest = facts["statistics"]["gram"]
    assert take_inventory(shell.ledger().objects).keys[key].blob == digest
    assert facts["statistics_bytes"] == blob(shell, digest).stat().st_size
    assert facts["statistics_seconds"] >= 0
    assert shell.acts()[-1].digests["statistic.gram"] == digest
    shell("gc", "--older-than", "0s", "--yes")

    # No version names it yet; it is repaired as if one did.
    data = blob(shell, digest).read_bytes()
    blob(shell, digest).unlink()
    (mended,) = shell.json("verify", "demo", "--repair")["store"]["damaged"]
    assert mended["remedy"] == REMEDY
    assert blob(shell, digest).read_bytes() == data
    shell.ledger().objects.store.local_path(key).write_bytes(b"{")
    (mended,) = shell.json("verify", "demo", "--repair")["store"]["damaged"]
    assert mended["outcome"] == "written again from the state of line demo (colour 1)"

    monkeypatch.setattr("restitch.tasks.statistics.write_statistic_of", None)
    shell("remerge", "demo")
    assert record(shell).statistics == {"gram/colour": digest}
    assert record(shell).members["colour"].facts.statistics_bytes == len(data)
    assert "statistics" in record(shell).timings
    assert "statistics" in shell("show", "demo").out


def test_matrices_are_measured_part_by_part_with_the_bytes_of_the_whole_model(
    world: World, new_home: NewHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = with_splits(world, tmp_path / "colour", "colour")
    files = ("--task", file, "--model", world.model("colour"), "--no-remerge")
    parts = line(new_home("parts"), world, tmp_path, "regmean")
    assert "whole model" not in parts("register", "demo", *files).err

    def refuse(*_: object) -> None:
        raise BadInput("its layers share a cache")

    monkeypatch.setattr("restitch.tasks.inputs.streamed_base.PartByPart", refuse)
    whole = line(new_home("whole"), world, tmp_path, "regmean")
    said = "the whole model is loaded to measure gram/colour: its layers share a cache"
    assert said in whole("register", "demo", *files).err
    one, other = (
        shell.state().tasks["colour"].versions[1].facts.statistics for shell in (parts, whole)
    )
    assert one == other
    assert one is not None


def test_a_model_that_reads_weights_past_its_modules_is_measured_as_a_whole(
    world: World, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are not in memory are not a number."""
    line(shell, world, tmp_path, "regmean")

    def without_weights(_: PartByPart, passes: Sequence[Pass], *_more: Any, **_named: Any) -> None:
        for one in passes:
            one()

    monkeypatch.setattr(PartByPart, "run", without_weights)
    file = with_splits(world, tmp_path / "colour", "colour")
    done = shell("register", "demo", "--task", file, "--model", world.model("colour"))
    assert "whole model is loaded to measure gram/colour: the head of task colour has" in done.err
    assert record(shell).statistics


def test_a_head_that_is_not_finite_is_refused_and_not_stored(
    world: World, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line(shell, world, tmp_path, "regmean")

    def nowhere(*_: Any, **_named: Any) -> torch.Tensor:
        return torch.full((2, 2), torch.nan)

    monkeypatch.setattr("restitch.modeling.families.text_encoder.embed_prompts", nowhere)
    file = with_splits(world, tmp_path / "colour", "colour")
    done = shell("register", "demo", "--task", file, "--model", world.model("colour"), code=None)
    assert "the head of task colour has numbers that are not finite" in done.err + done.out
    assert not keys(shell, "head")


def test_measuring_frees_a_loaded_model_that_leaves_too_little_memory(
    world: World, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line(shell, world, tmp_path, "regmean")
    loaded: list[int] = []

    def check(*_: object) -> None:
        loaded.append(len(live_base._live))
        if live_base._live:
            raise Unavailable("there is not enough memory")

    monkeypatch.setattr("restitch.tasks.inputs.streamed_base.check_memory", check)
    file = with_splits(world, tmp_path / "colour", "colour")
    shell("register", "demo", "--task", file, "--model", world.model("colour"), "--no-remerge")
    assert loaded == [1, 0], "checked again without the model that evaluated the task"
    assert keys(shell, "gram")


def test_a_remerge_measures_missing_statistics_for_a_new_method(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    line(shell, world, tmp_path, "averaging")
    add(shell, world, tmp_path, "colour")
    assert not shell.state().tasks["colour"].versions[1].facts.statistics
    assert "statistics" not in record(shell).timings
    line(shell, world, tmp_path, "fisher-merging")
    shell("remerge", "demo")
    assert set(record(shell).statistics) == {"fisher/colour"}
    method = {"tournament": ["regmean", {"name": "fisher-merging"}, "averaging"]}
    kept = {"mode": "dataless", "density": 1, "shots": 4}
    file = world.line(tmp_path / "l.yaml", method=method, localize=kept, retention=None)
    shell("init", file)
    again = with_splits(world, tmp_path / "number", "number")
    files = ("--task", again, "--model", world.model("number"))
    facts = shell.json("register", "demo", *files, "--no-remerge")["facts"]
    assert set(facts["statistics"]) == {"fisher", "gram"}


def test_other_rows_give_other_statistics_and_another_version(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    line(shell, world, tmp_path, "regmean")
    add(shell, world, tmp_path, "colour")
    line(shell, world, tmp_path, "regmean", shots=3)
    shell("remerge", "demo")
    assert shell.state().champion == 2
    assert len(keys(shell, "gram")) == 2
    assert len(keys(shell, "mask")) == 1, "the mask needs no rows"


def test_a_task_without_train_rows_is_refused_if_the_method_needs_them(
    world: World, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line(shell, world, tmp_path, "regmean")
    before = shell.head_bytes()
    files = ("--task", world.task("number"), "--model", world.model("number"))
    done = shell("register", "demo", *files, code=3)
    assert "regmean needs train rows of every task" in done.err
    assert "none for number" in done.err
    assert shell.head_bytes() == before
    # One that was on its way while the line was given the method: it joins, the merge refuses.
    with monkeypatch.context() as racing:
        racing.setattr("restitch.flows.lines.declare_task.check_rows_for", lambda *_: None)
        assert "none for number" in shell("register", "demo", *files, code=3).err
    assert shell.state().tasks["number"].versions[1].state == "ready"
    shell("retire", "demo", "number", "--no-remerge", "--reason", "it lacks rows")
    line(shell, world, tmp_path, "averaging")
    shell("restore", "demo", "number")
    given = {"name": "regmean"}
    file = world.line(tmp_path / "again.yaml", method=given, localize=None, retention=None)
    assert "none for number" in shell("init", file, code=3).err
    assert shell.state().spec.method.name == "averaging"


def test_a_comparison_leaves_out_methods_whose_rows_are_missing(
    world: World, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line(shell, world, tmp_path, "averaging")
    shell.add(world, "colour")
    monkeypatch.setattr(
        "restitch.flows.research.compare.method_names", lambda: ["averaging", "regmean"]
    )
    found = shell.json("compare", "demo")
    assert [row["method"] for row in found["methods"]] == ["averaging"]
    assert found["left_out"] == {"regmean": ["colour"]}
    assert "none for colour" in shell("compare", "demo", "--methods", "regmean", code=3).err
