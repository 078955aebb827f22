"""Forgotten models leave no trace in later merges; purged ones leave no weights."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from restitch.flows.decisions import forget
from restitch.flows.onboard import onboard_event
from restitch.flows.storage import purge
from restitch.registry.ledger.finetuned_models import ModelVersion
from restitch.registry.ledger.ledger import Ledger, state_after
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.records import MergedMember
from restitch.registry.ledger.references import PURGED
from restitch.registry.maintenance.inventory import in_use, purged_objects, take_inventory
from restitch.registry.store.deletion_notice import STATE
from restitch.registry.store.folder import FolderStore
from restitch.registry.store.objects import ObjectStore
from tests.conftest import NewHome, Three
from tests.registry.builders import digest, line_spec, model_ref, record, with_task
from tests.shell import Shell
from tests.worlds import World

without_mlflow = pytest.mark.usefixtures("without_mlflow")


@pytest.fixture
def copy(three: Three, tmp_path: Path) -> Shell:
    """A home of its own with three members."""
    shutil.copytree(three.shell.home, tmp_path / "copy")
    return Shell(tmp_path / "copy")


def patch_of(shell: Shell) -> str:
    champion = shell.state().champion
    assert champion is not None
    return shell.ledger().merged(champion).patch


def never(world: World, shell: Shell, folder: Path, *tasks: str) -> str:
    """The patch of a line on which only these tasks were ever registered."""
    shell("init", world.line(folder / "never.yaml"))
    for task in tasks:
        shell.add(world, task)
    return patch_of(shell)


def objects_of(shell: Shell) -> ObjectStore:
    return ObjectStore(FolderStore(shell.home / "store"))


def blobs(shell: Shell) -> set[str]:
    return set(objects_of(shell).store.list()) - {STATE}


def reason(*words: object) -> tuple[object, ...]:
    return (*words, "--reason", "a mistake")


@without_mlflow
def test_a_merge_after_forget_has_the_bytes_as_if_the_task_had_never_joined(
    world: World, copy: Shell, new_home: NewHome, tmp_path: Path
) -> None:
    done = copy.json(*reason("forget", "demo", "number"))
    assert (done["act"], done["merged"]["action"]) == ("forgotten", "promoted")
    assert patch_of(copy) == never(world, new_home("never"), tmp_path, "colour", "animal")
    line = copy.json("status")["lines"][0]
    assert {model["task"] for model in line["models"]} == {"colour", "animal"}
    assert line["without_models"] == []
    copy.check_settled()
    held = {
        v["version"]: v["forgotten"] for v in copy.json("history", "demo", "--versions")["versions"]
    }
    assert (held[1], held[3], held[4]) == ([], ["number 1"], [])
    assert copy.json("verify", "demo")["intact"]


@without_mlflow
def test_a_model_that_a_forgotten_one_had_replaced_is_back(world: World, copy: Shell) -> None:
    before = patch_of(copy)
    copy.add(world, "colour", model="colour-2")
    assert copy.state().tasks["colour"].versions[1].state == "replaced"
    copy.json(*reason("forget", "demo", "colour/2"))
    first, second = (copy.state().tasks["colour"].versions[n] for n in (1, 2))
    assert (first.state, first.reason, second.state) == ("ready", None, "forgotten")
    assert patch_of(copy) == before


@without_mlflow
def test_forgotten_weights_can_be_registered_again_but_not_restored(
    world: World, copy: Shell, tmp_path: Path
) -> None:
    before = patch_of(copy)
    copy(*reason("forget", "demo", "number"))
    refused = copy("restore", "demo", "number", code=3)
    assert "forgotten, which is final" in refused.err
    assert "restitch register" in refused.err
    # Another description of the task needs no --replace-task, for the old one is forgotten.
    other = tmp_path / "number.yaml"
    text = world.task("number").read_text(encoding="utf-8").replace("it is {}", "this is {}")
    other.write_text(text, encoding="utf-8")
    files = ("--task", other, "--model", world.model("number"))
    done = copy.json("register", "demo", *files)
    assert (done["version"], done["already"], done["state"]) == (2, False, "ready")
    assert patch_of(copy) == before


@without_mlflow
def test_forgetting_the_last_member_leaves_no_champion_and_a_second_time_does_nothing(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    shell("init", world.line(tmp_path / "line.yaml"))
    shell.add(world, "colour")
    shell(*reason("forget", "demo", "colour/1"))
    assert shell.state().champion is None
    assert shell.json("status")["lines"][0]["without_models"] == ["colour"]
    acts = len(shell.acts())
    assert shell.json(*reason("forget", "demo", "colour/1"))["done"] is False
    assert len(shell.acts()) == acts
    assert "has no model 7" in shell(*reason("forget", "demo", "colour/7"), code=3).err
    assert "has no task colur" in shell(*reason("forget", "demo", "colur"), code=3).err


@without_mlflow
def test_a_purge_deletes_weights_and_keeps_the_record_and_the_trail(
    world: World, copy: Shell, tmp_path: Path
) -> None:
    model = copy.state().tasks["number"].versions[1]
    gone = [copy.ledger().merged(n).patch for n in (2, 3)]
    kept = copy.ledger().merged(1).patch
    refused = copy(*reason("forget", "demo", "number", "--purge"), code=2)
    assert "--yes" in refused.err
    assert "merged versions that hold them: 2, 3" in refused.err
    assert copy.state().tasks["number"].versions[1].state == "ready"

    done = copy.json(*reason("forget", "demo", "number", "--purge", "--yes"))
    assert (done["models"], done["versions"], done["complete"]) == (["number 1"], [2, 3], True)
    objects = objects_of(copy)
    for blob in (str(model.delta), *gone):
        assert not objects.store.exists(f"blobs/{blob}")
    assert objects.store.exists(f"blobs/{kept}")
    act = copy.acts()[-1]
    assert (act.kind, act.reason) == ("purged", "number: a mistake")
    listed = {each["object"] for each in json.loads(objects.read_blob(act.digests[PURGED]))}
    assert f"blobs/{model.delta}" in listed
    assert not listed & blobs(copy)
    assert state_after(copy.acts()) == copy.state().model_copy(
        update={"generation": len(copy.acts())}
    )

    shown = copy.json("show", "demo", 3, code=3)
    assert shown["purged"]["reason"] == "a mistake"
    assert shown["results"]["number"]["merged"] is not None
    for words in (
        ("export", "demo", 3, tmp_path / "out"),
        ("report", "demo", 3, tmp_path / "report"),
        ("evaluate", "demo", 3),
        ("diff", "demo", 1, 3),
        ("verify", "demo", "--version", 3),
        reason("rollback", "demo", 3),
        reason("promote", "demo", 3),
    ):
        refused = copy(*words, code=3)
        assert "version 3 of line demo was purged by " in refused.err
        assert ": a mistake" in refused.err
    assert "purged by" in copy("show", "demo", 3, code=3).out
    copy("why", "demo", "number")
    verified = copy.json("verify", "demo")
    assert (verified["intact"], verified["purged"], verified["rebuilt"]) == (True, [2, 3], [1, 4])
    deep = copy.json("verify", "--deep")
    assert deep["intact"]
    assert deep["store"]["damaged"] == []
    copy.check_settled()
    # The same weights again: a new version, with everything made again.
    again = copy.add(world, "number")
    assert (again["version"], again["state"]) == (2, "ready")
    assert patch_of(copy) == gone[1]
    assert copy.json("verify", "demo")["intact"]
    assert copy.json("gc", "--older-than", "0s")["names"] == []


@without_mlflow
def test_a_purge_of_one_line_leaves_what_another_line_shares(
    world: World, copy: Shell, tmp_path: Path
) -> None:
    copy("init", world.line(tmp_path / "other.yaml", line="other"))
    files = ("--task", world.task("number"), "--model", world.model("number"))
    copy("register", "other", *files)
    delta = copy.state().tasks["number"].versions[1].delta
    assert copy.state("other").tasks["number"].versions[1].delta == delta
    done = copy.json(*reason("forget", "demo", "number", "--purge", "--yes"))
    assert any("number 1 of other" in note for note in done["notes"])
    assert objects_of(copy).store.exists(f"blobs/{delta}")
    deep = copy.json("verify", "--deep")
    assert deep["intact"]
    assert [line["rebuilt"] for line in deep["lines"]] == [[1, 4], [1]]
    copy("export", "other", "champion", tmp_path / "out")
    # When the other line purges it too, nothing needs it any more.
    copy(*reason("drop", "other", "--purge", "--yes"))
    assert not objects_of(copy).store.exists(f"blobs/{delta}")
    assert copy.json("verify", "--deep")["intact"]


@without_mlflow
@pytest.mark.parametrize("completed_by", ["the same command", "gc"])
def test_a_killed_purge_is_completed_by_another(
    copy: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, completed_by: str
) -> None:
    whole = Shell(tmp_path / "whole")
    shutil.copytree(copy.home, whole.home)
    words = reason("forget", "demo", "number", "--purge", "--yes")
    whole(*words)

    def killed(objects: ObjectStore, _: Any, names: list[str], **__: Any) -> None:
        for name in [name for name in names if name.startswith("keys/")][:2]:
            objects.store.remove(name)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(purge, "remove_objects", killed)
        copy(*words, code=130)
    assert copy.acts()[-1].kind == "purged"
    assert copy.json("verify", "--deep")["intact"]
    acts = len(copy.acts())
    if completed_by == "gc":
        copy("gc", "--older-than", "0s", "--yes")
    else:
        done = copy.json(*words)
        assert (done["entry"], done["complete"]) == (None, True)
    assert len(copy.acts()) == acts

    def weights(shell: Shell) -> set[str]:
        # Acts, the lists that they name and records of versions hold times.
        inventory = take_inventory(objects_of(shell))
        timed = ("attached", "record")
        needed = {d for d, refs in inventory.references.items() if refs[0].role not in timed}
        return needed | set(inventory.keys)

    assert weights(copy) == weights(whole)
    assert copy.state().versions.keys() == whole.state().versions.keys()
    inventory = take_inventory(objects_of(copy))
    assert purged_objects(inventory) == set()
    assert copy.json("verify", "--deep")["intact"]


@without_mlflow
def test_a_pinned_champion_keeps_what_it_holds_until_another_one_is_in_use(copy: Shell) -> None:
    copy("pin", "demo")
    patch, delta = patch_of(copy), copy.state().tasks["number"].versions[1].delta
    words = reason("forget", "demo", "number", "--purge", "--yes")
    done = copy.json(*words, code=5)
    assert (done["complete"], done["versions"]) == (False, [2])
    assert any("to which the line is pinned" in note for note in done["notes"])
    assert {f"blobs/{patch}", f"blobs/{delta}"} <= blobs(copy)
    assert copy.json("verify", "--deep")["intact"]
    copy("unpin", "demo")
    done = copy.json(*words)
    assert (done["complete"], done["versions"]) == (True, [3])
    assert not {f"blobs/{patch}", f"blobs/{delta}"} & blobs(copy)
    assert copy.json("verify", "--deep")["intact"]


@without_mlflow
def test_a_copy_of_the_model_goes_from_the_store_and_from_this_machine(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    shell("init", world.line(tmp_path / "line.yaml"))
    shell.add(world, "colour")
    shell.add(world, "number", "--copy")
    uri = shell.state().tasks["number"].versions[1].model.uri
    manifest = uri.removeprefix("store://")
    files = json.loads(objects_of(shell).read_blob(manifest))["files"]
    assert (shell.home / "cache" / "sources" / manifest).is_dir()
    shell(*reason("forget", "demo", "number", "--purge", "--yes"))
    weights = files["model.safetensors"]
    assert not {f"blobs/{manifest}", f"blobs/{weights}"} & blobs(shell)
    assert not (shell.home / "cache" / "sources" / manifest).exists()
    assert shell.json("verify", "--deep")["intact"]


@without_mlflow
def test_a_dropped_line_is_out_of_use_and_its_history_stays(
    world: World, copy: Shell, tmp_path: Path
) -> None:
    done = copy.json(*reason("drop", "demo"))
    assert (done["act"], done["champion"]) == ("dropped", None)
    assert copy.json("status")["lines"] == []
    assert copy.json("history", "demo")["acts"][0]["kind"] == "dropped"
    assert copy.json("verify", "demo")["intact"]
    copy("export", "demo", 3, tmp_path / "out")
    files = ("--task", world.task("colour"), "--model", world.model("colour"))
    for words in (
        ("status", "demo"),
        ("remerge", "demo"),
        ("register", "demo", *files),
        reason("promote", "demo", 3),
        reason("rollback", "demo", 3),
        reason("forget", "demo", "colour"),
    ):
        assert "line demo was dropped by " in copy(*words, code=3).err
    assert copy.json(*reason("drop", "demo"))["done"] is False
    before = copy.head_bytes()
    for named in ((2, None), (None, 7)):  # a version of the line, or one that MLflow made
        with copy.inside():
            assert onboard_event("demo", "colour", *named) is None
    assert copy.head_bytes() == before, "events of a dropped line are ignored"
    # The same name starts again, and its history goes on.
    again = copy.json("init", world.line(tmp_path / "again.yaml"))
    assert (again["created"], again["again"]) == (False, True)
    done = copy.json("register", "demo", *files)
    assert (done["version"], done["champion"]) == (2, 4)
    assert copy.json("verify", "demo")["intact"]
    copy.check_settled()


@without_mlflow
def test_only_named_actors_may_forget_and_drop(world: World, shell: Shell, tmp_path: Path) -> None:
    actors = {"forget": ["ann"], "drop": ["ann"]}
    shell("init", world.line(tmp_path / "line.yaml", actors=actors))
    shell.add(world, "colour")
    bob = Shell(shell.home, {"RESTITCH_ACTOR": "bob"})
    assert "bob may not forget" in bob(*reason("forget", "demo", "colour"), code=3).err
    assert "bob may not drop" in bob(*reason("drop", "demo", "--purge", "--yes"), code=3).err
    ann = Shell(shell.home, {"RESTITCH_ACTOR": "ann"})
    ann(*reason("forget", "demo", "colour"))


def test_mlflow_shows_what_was_forgotten_as_archived(world: World, copy: Shell) -> None:
    from mlflow.entities import ViewType

    from restitch.registry.home import Home
    from restitch.registry.mlflow.connection import connect

    copy(*reason("forget", "demo", "number", "--purge", "--yes"))
    with copy.inside():
        client = connect(Home.from_environment())
    shown = client.get_model_version("demo.number", "1")
    assert shown.tags["restitch.state"] == "forgotten"
    assert shown.tags["restitch.archived"] == "a mistake"
    assert shown.tags["restitch.purged"].endswith("UTC: a mistake")
    assert client.get_registered_model("demo.number").tags["restitch.archived"] == "true"
    assert "restitch.archived" not in client.get_registered_model("demo.colour").tags
    experiment = client.get_experiment_by_name("demo.models")
    runs = client.search_runs([experiment.experiment_id], run_view_type=ViewType.DELETED_ONLY)
    assert [run.info.run_name for run in runs] == ["number 1"]
    versions = client.search_model_versions("name = 'demo'")
    marked = {int(v.tags["restitch.version"]) for v in versions if "restitch.purged" in v.tags}
    assert marked == {2, 3}
    assert copy.json("verify", "--deep")["intact"]

    copy(*reason("drop", "demo"))
    stages = {e.name: e.lifecycle_stage for e in client.search_experiments(ViewType.ALL)}
    assert stages["demo"] == stages["demo.models"] == stages["demo.history"] == "deleted"
    assert stages["demo.audit"] == "active"
    assert client.get_registered_model("demo").aliases == {}
    assert client.get_registered_model("demo").tags["restitch.archived"] == "true"
    assert copy.json("verify", "--deep")["intact"]

    copy("init", world.line(copy.home / "again.yaml"))
    copy.add(world, "colour")
    stages = {e.name: e.lifecycle_stage for e in client.search_experiments(ViewType.ALL)}
    assert set(stages.values()) == {"active"}
    assert "restitch.archived" not in client.get_registered_model("demo").tags
    shown_runs = client.search_runs([experiment.experiment_id])
    assert [run.info.run_name for run in shown_runs] == ["colour 2"]
    assert copy.json("verify", "--deep")["intact"]


# A line without real weights: what matters here is which objects refer to which.
TASKS, WEIGHTS = ("a", "b"), ("x", "y")
steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from(TASKS), st.sampled_from(WEIGHTS)),
        st.tuples(st.just("merge"), st.just(""), st.just("")),
        st.tuples(st.just("forget"), st.sampled_from(TASKS), st.just("")),
        st.tuples(st.just("purge"), st.sampled_from(TASKS), st.just("")),
    ),
    max_size=12,
)


@pytest.fixture
def empty(shell: Shell) -> Iterator[Shell]:
    with shell.inside():
        yield shell


def _add(ledger: Ledger, task: str, weights: str) -> None:
    objects = ledger.objects
    made = {name: objects.put_blob(f"{name} {weights}".encode()) for name in ("delta", "gram")}
    objects.publish("mask", digest(weights), made["delta"])
    model = ModelVersion.model_validate(
        {
            "model": model_ref(weights),
            "state": "ready",
            "mask": digest(f"mask {weights}"),
            "delta": made["delta"],
            "facts": {"statistics": {"gram": made["gram"]}},
        }
    )
    ledger.act("registered", "ann", task, lambda now: with_task(now, task, model), {})


def _merge(ledger: Ledger) -> None:
    def change(now: LineState) -> LineState:
        members = {
            m.task: MergedMember(
                version=m.version,
                uri=m.model.model.uri,
                weights=m.model.model.weights,
                mask=str(m.model.mask),
                delta=str(m.model.delta),
            )
            for m in now.members
        }
        names = " ".join(f"{t}{m.weights[:8]}" for t, m in members.items())
        patch = ledger.objects.put_blob(f"patch {names}".encode())
        made = record(now.next_version, patch=patch, members=members, results={}, retention=None)
        ledger.objects.put_blob(made.to_bytes())
        merged = now.with_merged(made.digest)
        return merged.promoted(now.next_version)

    ledger.act("merged", "ann", "merged", change)


@without_mlflow
@given(steps=steps)
@settings(
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_whatever_is_purged_nothing_that_is_needed_is_lost(
    empty: Shell, steps: list[tuple[str, str, str]]
) -> None:
    shutil.rmtree(empty.home / "store", ignore_errors=True)
    ledger = Ledger(objects_of(empty), "line")
    ledger.create(line_spec("line"), model_ref("base"), "ann", "made")
    for step, task, weights in steps:
        known = ledger.state().tasks
        if step == "add":
            _add(ledger, task, weights)
        elif step == "merge":
            _merge(ledger)
        elif task in known and step == "forget":
            forget("line", task, "a mistake", merge=False)
        elif task in known:
            purge.forget_and_purge("line", task, "a mistake", merge=False)
    inventory = take_inventory(ledger.objects)
    assert inventory.damaged == {}
    missing = [d for d in inventory.references if f"blobs/{d}" not in inventory.listed]
    assert missing == []
    # Nothing is left that only purged models and versions had.
    assert purged_objects(inventory) == set()
    assert not {f"blobs/{d}" for d in inventory.purged.keys() - inventory.references.keys()} & set(
        inventory.listed
    )
    for key in inventory.keys.values():
        assert f"blobs/{key.blob}" in inventory.listed
    assert in_use(inventory, ledger.objects) <= set(inventory.listed)
    acts = list(ledger.entries(newest_first=False))
    now = ledger.state()
    assert state_after(acts) == now.model_copy(update={"generation": len(acts)})
    if now.champion is not None:
        assert now.champion not in now.purged
