"""Lines whose method needs rows of its members: from the file to the audit of the result."""

from pathlib import Path
from typing import Any

import pytest

from merging.recipe import Recipe
from registry.history import MergedRecord
from registry.inventory import take_inventory
from tests.conftest import NewHome
from tests.flows.test_localizing import with_splits
from tests.shell import Shell
from tests.worlds import World

pytestmark = pytest.mark.usefixtures("without_mlflow")

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
    return shell.ledger().merged(shell.head().champion or 0)


def keys(shell: Shell, kind: str) -> dict[str, bytes]:
    store = shell.ledger().objects.store
    return {name: store.read(name) for name in store.list(f"keys/{kind}")}


def blob(shell: Shell, digest: str) -> Path:
    return shell.ledger().objects.store.local_path(f"blobs/{digest}")


@pytest.mark.parametrize(
    ("method", "kind"),
    [("fisher-merging", "fisher"), ("regmean", "gram"), ("adamerging", "coefficients")],
)
def test_order_and_increments_do_not_matter_and_a_version_is_rebuilt_from_its_recipe(
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
        assert set(named) == {f"{kind}/colour", f"{kind}/number"}
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


def test_what_a_version_was_made_from_stays_and_is_made_again_where_it_is_damaged(
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
    told = shell.json("verify", "demo", code=7)["findings"]
    assert "version 1, its statistics" in {one["subject"] for one in told}
    found = shell.json("verify", "--deep", code=7)
    (damaged,) = found["store"]["damaged"]
    assert damaged["what"] == ["the fisher/colour of version 1 (demo)"]
    assert damaged["remedy"] == "the deltas and train rows of colour (it is numeric)"
    (mended,) = shell.json("verify", "demo", "--repair")["store"]["damaged"]
    assert mended["mended"]
    assert blob(shell, digest).read_bytes() == data

    shell.ledger().objects.store.local_path(key).write_bytes(b"{")
    (mended,) = shell.json("verify", "demo", "--repair")["store"]["damaged"]
    assert mended["outcome"] == "written again from the recipe of version 1"
    inventory = take_inventory(shell.ledger().objects)
    assert inventory.keys[key].blob == digest
    shell.check_settled()


def test_other_rows_are_other_statistics_and_another_version(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    line(shell, world, tmp_path, "regmean")
    add(shell, world, tmp_path, "colour")
    line(shell, world, tmp_path, "regmean", shots=3)
    shell("remerge", "demo")
    assert shell.head().champion == 2
    assert len(keys(shell, "gram")) == 2
    assert len(keys(shell, "mask")) == 1, "the mask needs no rows"


def test_a_task_without_train_rows_is_refused_where_the_method_needs_them(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    line(shell, world, tmp_path, "regmean")
    before = shell.head_bytes()
    files = ("--task", world.task("number"), "--model", world.model("number"))
    done = shell("register", "demo", *files, code=3)
    assert "regmean needs train rows of every task" in done.err
    assert "none for number" in done.err
    assert shell.head_bytes() == before
    line(shell, world, tmp_path, "averaging")
    shell.add(world, "number")
    given = {"name": "regmean"}
    file = world.line(tmp_path / "again.yaml", method=given, localize=None, retention=None)
    assert "none for number" in shell("init", file, code=3).err
    assert shell.head().spec.method.name == "averaging"


def test_a_comparison_of_all_methods_leaves_out_those_that_lack_rows(
    world: World, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line(shell, world, tmp_path, "averaging")
    shell.add(world, "colour")
    monkeypatch.setattr("flows.compare.method_names", lambda: ["averaging", "regmean"])
    found = shell.json("compare", "demo")
    assert [row["method"] for row in found["methods"]] == ["averaging"]
    assert found["left_out"] == {"regmean": ["colour"]}
    assert "none for colour" in shell("compare", "demo", "--methods", "regmean", code=3).err
