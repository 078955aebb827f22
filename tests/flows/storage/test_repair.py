"""Every damaged object is named, and restored to the same bytes or reported as lost."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from restitch.registry.home import Home
from restitch.registry.maintenance.inventory import take_inventory
from restitch.registry.mlflow.connection import connect
from restitch.registry.store.folder import FolderStore
from restitch.registry.store.objects import ObjectStore
from tests.conftest import NewHome, Three
from tests.flows.storage.test_gc import exported
from tests.flows.test_localizing import add_with_splits
from tests.shell import Shell
from tests.worlds import World, copied

# Kinds of objects to damage; each is one object of a line with three members.
NAMED = ("record", "delta", "patch", "grafted", "finetuned", "base", "merged", "merged (retention)")
KEYS = ("mask", "patch", "result", "head", "rows", "analysis")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


AWAY = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
WAYS: dict[str, Callable[[Path], Any]] = {"flipped": flip, "cut": cut, "gone": Path.unlink}


@pytest.fixture
def copy(three: Three, tmp_path: Path) -> Shell:
    """A home of its own with three members and their projection in MLflow."""
    shutil.copytree(three.shell.home, tmp_path / "home")
    return Shell(tmp_path / "home")


def contents(shell: Shell) -> dict[str, bytes]:
    store = FolderStore(shell.home / "store")
    return {name: store.read(name) for name in store.list()}


def picked(shell: Shell) -> dict[str, str]:
    """One object of each kind, by its kind."""
    found = take_inventory(ObjectStore(FolderStore(shell.home / "store")))
    names: dict[str, str] = {}
    for digest, references in found.references.items():
        for each in references:
            names.setdefault(each.weights or each.role, f"blobs/{digest}")
    names = {what: names[what] for what in NAMED}
    for name, key in found.keys.items():
        kind = name.split("/")[1]
        names.setdefault(f"key {kind}", name)
        if kind in ("head", "rows", "analysis") and name != names[f"key {kind}"]:
            names.setdefault(f"made for {kind}", f"blobs/{key.blob}")
    acts = shell.acts()
    return names | {"act": f"audit/{acts[3].digest}", "last act": f"audit/{acts[-1].digest}"}


def damaged(found: Any) -> dict[str, Any]:
    return {one["object"]: one for one in found["store"]["damaged"]}


@pytest.mark.parametrize("how", WAYS)
def test_damaged_objects_are_restored_to_the_same_bytes(
    copy: Shell, tmp_path: Path, how: str
) -> None:
    before, objects = contents(copy), picked(copy)
    versions = exported(copy, tmp_path / "before")
    for name in set(objects.values()):
        WAYS[how](copy.home / "store" / name)
    found = damaged(copy.json("verify", "--deep", code=7))
    hidden = {"act", "last act"} if how == "gone" else set()
    hidden |= {what for what in objects if what.startswith(("key", "made for"))}
    assert {objects[what] for what in objects if what not in hidden | {*NAMED}} <= found.keys()
    mended = damaged(copy.json("verify", "demo", "--repair"))
    assert all(one["mended"] for one in mended.values())
    if how != "gone":  # a missing key is no damage: a command that needs it makes it again
        assert {*objects.values()} <= mended.keys()
    after = contents(copy)
    for name, data in before.items():
        if name.startswith(("blobs/", "audit/", "lines/")) and name in after:
            assert after[name] == data, name
    kept = {objects[what] for what in (*NAMED, "act", "last act")}
    assert kept <= after.keys()
    assert copy.json("verify", "--deep")["store"]["damaged"] == []
    assert exported(copy, tmp_path / "after") == versions
    copy("remerge", "demo", "--force")
    assert copy.state().champion == 3, "the same bytes give no new version"


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("what", ["delta", "patch", "record", "grafted", "key patch", "key mask"])
def test_a_damaged_object_is_listed_with_its_owners_and_its_source(
    copy: Shell, what: str, how: str
) -> None:
    name = picked(copy)[what]
    before = contents(copy)
    WAYS[how](copy.home / "store" / name)
    found = copy.json("verify", "--deep", code=0 if what.startswith("key") and how == "gone" else 7)
    if found["intact"]:
        return
    (one,) = found["store"]["damaged"]
    assert one["object"] == name
    assert one["remedy"]
    assert not one["mended"]
    if what == "delta":
        assert "the delta of colour 1 (demo)" in one["what"]
        assert {"colour 1 of demo", "version 1 of demo", "version 3 of demo"} <= {*one["depends"]}
        assert "models/colour" in one["remedy"]
        output = copy("verify", "--deep", code=7).out
        assert f"DAMAGE: {name}" in output
        assert "--repair would " in output
    again = damaged(copy.json("verify", "--repair"))
    assert again[name]["mended"]
    assert contents(copy).keys() == before.keys()
    if not what.startswith("key"):
        assert contents(copy) == before


def test_the_state_of_a_line_is_restored_from_its_acts(copy: Shell) -> None:
    file = copy.home / "store" / "lines" / "demo" / "head.json"
    whole = json.loads(file.read_bytes())
    lie = json.dumps({**whole, "champion": 1})
    for damage in (
        flip,
        cut,
        Path.unlink,
        lambda f: f.write_text(lie),
    ):
        damage(file)
        assert "lines/demo/head.json" in damaged(copy.json("verify", "demo", "--deep", code=7))
        assert copy.json("verify", "--repair")["intact"]
        again = json.loads(file.read_bytes())
        assert {**again, "generation": 0} == {**whole, "generation": 0}


def test_without_mlflow_acts_and_records_come_only_from_a_backup(copy: Shell) -> None:
    # A patch of another version: only the record of version 1 says how to make its own patch.
    record, patch = copy.state().versions[1], copy.ledger().merged(2).patch
    before = contents(copy)
    names = [picked(copy)["act"], f"blobs/{record}", f"blobs/{patch}"]
    for name in names:
        flip(copy.home / "store" / name)
    away = Shell(copy.home, AWAY)
    for options in (("--deep",), ("--repair",)):
        found = damaged(away.json("verify", *options, code=7))
        assert found[names[0]]["remedy"] is None
        assert found[names[1]]["remedy"] is None
        assert not found[names[0]]["mended"]
    assert "only a backup can restore it" in away("verify", "--deep", code=7).out
    assert found[names[2]]["mended"], "other objects are repaired nevertheless"
    for name in names[:2]:
        (copy.home / "store" / name).write_bytes(before[name])
    assert away.json("verify", "--deep")["store"]["intact"]


def test_a_delta_is_lost_if_its_model_is_gone_or_gives_other_bytes(
    world: World, new_home: NewHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = new_home("home")
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    model = copied(world.model("colour"), tmp_path / "model")
    shell("register", "demo", "--task", world.task("colour"), "--model", model)
    delta = shell.state().tasks["colour"].versions[1].delta
    file = shell.home / "store" / "blobs" / str(delta)
    whole = file.read_bytes()
    flip(file)
    broken = file.read_bytes()
    # As if the mask were found by gradients on another device.
    from restitch.tasks.localize import write_delta

    def differently(path: Path, *given: Any) -> Any:
        found = write_delta(path, *given)
        flip(path)
        return found

    with monkeypatch.context() as patched:
        patched.setattr("restitch.flows.storage.repair_sources.write_delta", differently)
        one = damaged(shell.json("verify", "--repair", code=7))[f"blobs/{delta}"]
    assert "it is lost" in one["outcome"]
    assert "gives" in one["outcome"]
    assert file.read_bytes() == broken
    model.rename(tmp_path / "moved")
    one = damaged(shell.json("verify", "--repair", code=7))[f"blobs/{delta}"]
    assert "it is lost" in one["outcome"]
    assert file.read_bytes() == broken
    (tmp_path / "moved").rename(model)
    shell("verify", "--repair")
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    "localize",
    [
        {"mode": "dataless", "density": "auto", "recovery": 0.7, "max_density": 1.0},
        {"mode": "subspace", "rank": "auto", "recovery": 0.7, "max_rank": 1.0},
    ],
)
@pytest.mark.usefixtures("without_mlflow")
def test_a_delta_that_validation_rows_chose_is_restored_at_its_recorded_size(
    world: World,
    new_home: NewHome,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    localize: dict[str, Any],
) -> None:
    """The rule that chose it may be another one now."""
    shell = new_home("home")
    method = "task-arithmetic" if localize["mode"] == "subspace" else "localize-and-stitch"
    line = {"retention": None, "localize": localize, "method": method}
    shell("init", world.line(tmp_path / "line.yaml", **line))
    add_with_splits(shell, world, tmp_path, "colour")
    assert shell.state().tasks["colour"].versions[1].facts.recovery is not None
    file = shell.home / "store" / "blobs" / str(shell.state().tasks["colour"].versions[1].delta)
    whole = file.read_bytes()
    flip(file)
    monkeypatch.setattr("restitch.tasks.recovery.Look.supports", lambda *_: False)
    shell("verify", "--repair")
    assert file.read_bytes() == whole


@pytest.mark.usefixtures("without_mlflow")
def test_a_copied_model_is_restored_only_from_the_cache(
    world: World, new_home: NewHome, tmp_path: Path
) -> None:
    shell = new_home("home")
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    shell(
        "register",
        "demo",
        "--task",
        world.task("colour"),
        "--model",
        world.model("colour"),
        "--copy",
    )
    uri = shell.state().tasks["colour"].versions[1].model.uri
    manifest = shell.home / "store" / "blobs" / uri.removeprefix("store://")
    files = json.loads(manifest.read_bytes())["files"]
    weights = shell.home / "store" / "blobs" / files["model.safetensors"]
    whole = {path: path.read_bytes() for path in (manifest, weights)}
    cached = shell.home / "cache" / "sources" / manifest.name / "model.safetensors"
    assert cached.read_bytes() == whole[weights]
    for path in whole:
        path.unlink()
    found = damaged(shell.json("verify", "--deep", code=7))
    assert "the list of files of colour 1 (demo)" in found[f"blobs/{manifest.name}"]["what"]
    shell("verify", "--repair")
    assert {path: path.read_bytes() for path in whole} == whole
    cached.unlink()
    weights.unlink()
    one = damaged(shell.json("verify", "--repair", code=7))[f"blobs/{weights.name}"]
    assert one["what"] == ["the file model.safetensors of colour 1 (demo)"]
    assert "restore" in one["outcome"]


def test_the_copy_of_a_base_is_restored_from_the_source_of_the_base(
    world: World, new_home: NewHome, tmp_path: Path
) -> None:
    """Only a line in a bucket copies its base; here its state is edited to say so."""
    from restitch.registry.sources.resolve import copy_into_store, resolve_source

    shell = new_home("home")
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    home = Home(shell.home)
    copied_base = copy_into_store(resolve_source(world.base, home), home)
    ledger = shell.ledger()
    base = ledger.state().base.model_copy(update={"uri": copied_base.uri})
    ledger.act(
        "configured",
        "me",
        "copied",
        lambda line_state: line_state.model_copy(update={"base": base}),
    )
    store = FolderStore(shell.home / "store")
    before = {name: store.read(name) for name in store.list("blobs")}
    for name in before:
        store.remove(name)
    shell("verify", "--repair")
    assert {name: store.read(name) for name in store.list("blobs")} == before


def test_mlflow_is_completed_from_the_trail(copy: Shell) -> None:
    client = connect(Home(copy.home))
    client.set_registered_model_alias("demo", "champion", "1")
    client.delete_model_version("demo", "2")
    experiment = client.get_experiment_by_name("demo.audit")
    client.delete_run(client.search_runs([experiment.experiment_id])[0].info.run_id)
    found = damaged(copy.json("verify", "--deep", code=7))
    problem = found["MLflow: demo"]["problem"]
    assert "the alias champion is on version 1, not version 3" in problem
    assert "version 2 is missing" in problem
    assert "act 13 (promoted) is missing" in problem
    assert found["MLflow: demo"]["remedy"] == "complete it from the trail"
    assert copy.json("verify", "--repair")["intact"]
    assert copy.json("verify", "--deep")["store"]["damaged"] == []
    alias = client.get_model_version_by_alias("demo", "champion")
    assert alias.tags["restitch.version"] == "3"


# Two children, killed at their first and at their third write. The parent imports what each of
# them would import for seconds.
KILLED = """
import os, signal
import datasets, mlflow
from transformers import AutoTokenizer, BertModel
from restitch.flows.storage.verify_all import verify_all
from restitch.registry.store.folder import FolderStore

left = 0
def dies(real):
    def call(*arguments, **given):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return real(*arguments, **given)
    return call
for name in ("mend", "remove", "put", "swap"):
    setattr(FolderStore, name, dies(getattr(FolderStore, name)))
for left in (0, 2):
    pid = os.fork()
    if pid == 0:
        verify_all(None, deep=True, repair=True)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, status
"""


def test_a_repair_killed_at_any_write_continues_and_touches_nothing_intact(
    copy: Shell,
) -> None:
    objects = picked(copy)
    before = contents(copy)
    broken = {objects[what] for what in ("delta", "patch", "grafted", "key mask", "act")}
    for name in broken:
        cut(copy.home / "store" / name)
    copy.python(KILLED)
    for name, data in contents(copy).items():
        assert name in broken or data == before[name]
    assert copy.json("verify", "--repair")["intact"]
    after = contents(copy)
    mask = objects["key mask"]
    assert {**after, mask: b""} == {**before, mask: b""}
    assert json.loads(after[mask])["blob"] == json.loads(before[mask])["blob"]
    assert json.loads(after[mask])["facts"] == json.loads(before[mask])["facts"]


def test_orphans_are_listed_and_are_no_damage(copy: Shell) -> None:
    name = f"blobs/{ObjectStore(FolderStore(copy.home / 'store')).put_blob(b'nobody asks')}"
    found = copy.json("verify", "--deep")
    assert found["store"]["orphans"] == [name]
    assert "nothing refers to 1 objects (11 B)" in copy("verify", "--deep").out
    flip(copy.home / "store" / name)
    one = damaged(copy.json("verify", "--repair"))[name]
    assert one["mended"]
    assert not (copy.home / "store" / name).exists()


def test_without_a_name_all_lines_are_verified(copy: Shell, new_home: NewHome) -> None:
    found = copy.json("verify")
    assert [line["line"] for line in found["lines"]] == ["demo"]
    assert found["store"] is None
    assert "no line to verify" in new_home("empty")("verify", code=3).err
    assert "need one line" in copy("verify", "--deep", "--version", "1", code=2).err


@pytest.mark.parametrize("rounds", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_random_damage_is_found_and_repaired(three: Three, tmp_path: Path, rounds: int) -> None:
    chance, done = random.Random(rounds), Counter[str]()
    for number in range(rounds):
        shutil.copytree(three.shell.home, tmp_path / str(number))
        copy = Shell(tmp_path / str(number))
        before = contents(copy)
        names = [n for n in before if n.startswith(("blobs/", "audit/", "lines/"))]
        for name in chance.sample(names, 4):
            how = chance.choice(["bit", "cut", "gone"])
            path = copy.home / "store" / name
            if how == "bit":
                data = bytearray(path.read_bytes())
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
                path.write_bytes(data)
            else:
                WAYS[how](path)
            done[f"{how} {name.split('/')[0]}"] += 1
        found = copy.json("verify", "--repair")
        after = contents(copy)
        for name in names:
            # A restored state has another generation; caches come back when they are needed.
            assert name.startswith("lines/") or after.get(name, before[name]) == before[name]
        done["found"] += len(found["store"]["damaged"])
        done["mended"] += sum(one["mended"] for one in found["store"]["damaged"])
        assert copy.json("verify", "--deep")["intact"]
        shutil.rmtree(copy.home)
    assert done["found"] == done["mended"]
    print(dict(done))  # shown by -s
