"""Only unreferenced objects are removed, also after a kill and next to other processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from restitch.merging.digests import digest_bytes
from restitch.merging.errors import Unavailable
from restitch.registry.ledger.references import digests_in
from restitch.registry.maintenance.inventory import in_use, take_inventory
from restitch.registry.store.deletion_notice import STATE, deletion_notice
from restitch.registry.store.folder import FolderStore
from restitch.registry.store.objects import ObjectStore
from tests.conftest import NewHome, Three
from tests.registry.builders import ledger as ledger_of
from tests.registry.builders import model, with_task
from tests.shell import ROOT, Shell
from tests.worlds import SKILLS, World

pytestmark = pytest.mark.usefixtures("without_mlflow")


@pytest.fixture
def copy(three: Three, tmp_path: Path) -> Shell:
    """A home of its own with three members."""
    shutil.copytree(three.shell.home, tmp_path / "home")
    return Shell(tmp_path / "home")


def objects_of(shell: Shell) -> ObjectStore:
    return ObjectStore(FolderStore(shell.home / "store"))


def littered(shell: Shell, age: float = 0.0) -> set[str]:
    """Unreferenced objects of this age: a what-if's patch, a result, and a blob without a key."""
    objects = objects_of(shell)
    blobs = [objects.put_blob(text) for text in (b"a trial's patch", b"a result", b"nobody's")]
    for kind, blob in (("patch", blobs[0]), ("result", blobs[1])):
        objects.publish(kind, blob, blob)
    names = {f"blobs/{blob}" for blob in blobs}
    names |= {f"keys/patch/{blobs[0]}", f"keys/result/{blobs[1]}"}
    then = time.time() - age
    for name in names:
        os.utime(shell.home / "store" / name, (then, then))
    return names


def names_of(shell: Shell) -> set[str]:
    return set(objects_of(shell).store.list()) - {STATE}


def exported(shell: Shell, folder: Path) -> dict[str, bytes]:
    """All files of all versions, as an export writes them."""
    found: dict[str, bytes] = {}
    for version in shell.state().versions:
        out = folder / str(version)
        shell("export", "demo", version, out)
        files = (path for path in sorted(out.rglob("*")) if path.is_file())
        found |= {str(file.relative_to(folder)): file.read_bytes() for file in files}
    return found


def test_gc_lists_unreferenced_objects_and_removes_them_only_with_yes(
    copy: Shell, tmp_path: Path
) -> None:
    before, versions = names_of(copy), exported(copy, tmp_path / "before")
    litter = littered(copy)
    shown = copy.json("gc", "--older-than", "0s")
    assert (shown["removed"], set(shown["names"])) == (False, litter)
    assert shown["kinds"] == {
        "blobs that no key names": {"objects": 1, "bytes": 8},
        "keys": {"objects": 2, "bytes": shown["kinds"]["keys"]["bytes"]},
        "patch": {"objects": 1, "bytes": 15},
        "result": {"objects": 1, "bytes": 8},
    }
    assert names_of(copy) == before | litter
    assert "5 objects would be removed" in copy("gc", "--older-than", "0s").out
    done = copy.json("gc", "--older-than", "0s", "--yes")
    assert (done["removed"], set(done["names"])) == (True, litter)
    assert names_of(copy) == before
    assert copy.json("gc", "--older-than", "0s", "--yes")["objects"] == 0
    assert copy.json("verify", "demo")["rebuilt"] == [1, 2, 3]
    assert exported(copy, tmp_path / "after") == versions


def test_young_objects_stay(copy: Shell) -> None:
    young = littered(copy)
    assert copy.json("gc")["objects"] == 0
    assert copy.json("gc", "--yes")["young"] == len(young)
    assert young <= names_of(copy)
    objects = objects_of(copy)
    # An old blob stays if its key is young: a process may just have found it again.
    for name in young:
        if name.startswith("blobs/"):
            os.utime(copy.home / "store" / name, (0, 0))
    assert copy.json("gc", "--yes", "--older-than", "12h")["objects"] == 1, "the blob without a key"
    assert objects.lookup("patch", next(n for n in young if "/patch/" in n).rpartition("/")[2])


def test_parts_of_a_merge_stay_while_it_offers_work(copy: Shell) -> None:
    objects = objects_of(copy)
    part = objects.put_blob(b"a part")
    objects.publish("part", part, part)
    objects.store.swap("offers/work/work.json", None, b"{}")
    before = names_of(copy)
    assert copy.json("gc", "--older-than", "0s", "--yes")["objects"] == 0
    assert names_of(copy) == before
    then = time.time() - 7200
    os.utime(copy.home / "store" / "offers" / "work" / "work.json", (then, then))
    removed = copy.json("gc", "--older-than", "0s", "--yes")
    gone = {"offers/work/work.json", f"keys/part/{part}", f"blobs/{part}"}
    assert before - names_of(copy) == gone
    assert {kind: each["objects"] for kind, each in removed["kinds"].items()} == {
        "keys": 1,
        "offers": 1,
        "part": 1,
    }


@pytest.mark.parametrize("age", ["", "x", "-3h", "3", "3y"])
def test_an_invalid_age_is_refused(copy: Shell, age: str) -> None:
    assert "is not an age" in copy("gc", f"--older-than={age}", code=3).err


def test_everything_that_an_audit_entry_names_stays(copy: Shell, world: World) -> None:
    """This includes replaced and retired models, and objects of acts outside of the trail."""
    copy.add(world, "colour", model="colour-2")
    copy("retire", "demo", "number", "--reason", "for the test")
    store = objects_of(copy)
    stray = store.put_blob(b"a mask of an act that lost its race")
    act = copy.acts()[3].model_copy(update={"digests": {"delta": stray}})
    store.store.put(f"audit/{act.digest}", act.to_bytes())
    named = {
        f"blobs/{word}"
        for name in store.store.list("audit")
        for word in digests_in(json.loads(store.store.read(name)))
    }
    named &= names_of(copy)
    assert f"blobs/{stray}" in named
    copy.json("gc", "--older-than", "0s", "--yes")
    assert named <= names_of(copy)
    assert copy.json("verify", "demo")["intact"]


def test_masks_stay_while_a_model_waits_to_be_onboarded(
    world: World, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell("init", world.line(tmp_path / "line.yaml", retention=None))

    def away(*_: object, **__: object) -> None:
        raise Unavailable("the data is away")

    task = ("register", "demo", "--task", world.task("colour"), "--model", world.model("colour"))
    with monkeypatch.context() as patched:
        patched.setattr("restitch.flows.onboard.evaluate", away)
        shell(*task, code=6)
    (mask,) = objects_of(shell).store.list("keys/mask")
    shell("gc", "--older-than", "0s", "--yes")
    assert list(objects_of(shell).store.list("keys/mask")) == [mask]


def test_nothing_is_removed_from_a_damaged_store(copy: Shell) -> None:
    littered(copy)
    (copy.home / "store" / "blobs" / copy.state().versions[2]).unlink()
    before = names_of(copy)
    output = copy("gc", "--older-than", "0s", "--yes", code=7).err
    assert copy.state().versions[2] in output
    assert "verify --repair" in output
    assert names_of(copy) == before


KILLED = """
import os, sys
from restitch.registry.store.folder import FolderStore
remove, calls = FolderStore.remove, []
def dies(self, name):
    calls.append(name)
    if len(calls) > int(sys.argv[1]):
        os.kill(os.getpid(), 9)
    return remove(self, name)
FolderStore.remove = dies
from restitch.flows.storage.gc import collect
collect(0.0, remove=True)
"""


def test_a_gc_killed_at_any_removal_leaves_no_key_without_a_blob_and_continues(
    copy: Shell, world: World
) -> None:
    before = names_of(copy)
    for calls in (0, 1, 3):
        litter = littered(copy)
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, str(calls)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "RESTITCH_HOME": str(copy.home)},
            capture_output=True,
            text=True,
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        objects = objects_of(copy)
        assert before <= names_of(copy) <= before | litter
        found = take_inventory(objects)
        assert not found.damaged
        assert all(objects.store.exists(f"blobs/{key.blob}") for key in found.keys.values())
    # Its deletion notice is still there, and blocks no other process.
    assert json.loads(objects.store.read(STATE))["names"]
    assert copy.add(world, "colour", model="colour-2")["state"] == "ready"
    copy("gc", "--older-than", "0s", "--yes")
    assert not litter & names_of(copy)
    assert copy.json("verify", "demo")["intact"]


REMOVING = """
import sys
from restitch.flows.storage.gc import collect
while True:
    try:
        collect(0.0, remove=True)
    except Exception as error:
        print(type(error).__name__, flush=True)
"""


def test_gc_during_registrations_loses_nothing_that_counts(
    world: World, three: Three, new_home: NewHome, tmp_path: Path
) -> None:
    """Even without a minimum age, so that gc removes objects that were just made."""
    shell = new_home("home")
    shell("init", world.line(tmp_path / "line.yaml"))
    removing = [sys.executable, "-c", REMOVING]
    around = {**os.environ, "PYTHONPATH": str(ROOT), "RESTITCH_HOME": str(shell.home)}
    pipes: dict[str, Any] = {"env": around, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(removing, **pipes)
    failed = 0
    try:
        for name in SKILLS:
            task = ("--task", world.task(name), "--model", world.model(name))
            for _ in range(6):
                done = shell("register", "demo", *task, code=None)
                assert done.code in (0, 6, 7), done.err
                failed += done.code != 0
                found = take_inventory(objects_of(shell))
                assert not {n for n in found.damaged if not n.startswith("keys/")}
                if done.code == 0 and not shell("remerge", "demo", code=None).code:
                    break
            if name == SKILLS[1]:  # kill the removing process and start another
                process.kill()
                process.wait()
                process = subprocess.Popen(removing, **pipes)
    finally:
        process.kill()
        process.communicate()
    for name in SKILLS:
        task = ("--task", world.task(name), "--model", world.model(name))
        shell("register", "demo", *task)
    shell("remerge", "demo")
    assert shell.patch_bytes() == three.shell.patch_bytes()
    assert shell.json("verify", "demo")["intact"]
    objects = objects_of(shell)
    found = take_inventory(objects)
    assert in_use(found, objects) <= set(found.listed)


def test_a_key_published_before_the_deletion_notice_keeps_its_blob(
    copy: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    lone = littered(copy)
    objects = objects_of(copy)
    (blob,) = (name for name in lone if name.endswith(digest_bytes(b"nobody's")))
    digest = blob.removeprefix("blobs/")

    @contextmanager
    def late(*asked: Any) -> Iterator[None]:
        objects.publish("patch", digest, digest)
        with deletion_notice(*asked):
            yield

    monkeypatch.setattr("restitch.flows.storage.gc.deletion_notice", late)
    copy("gc", "--older-than", "0s", "--yes")
    assert {blob, f"keys/patch/{digest}"} == names_of(copy) & (lone | {f"keys/patch/{digest}"})


def test_a_key_whose_blob_is_being_removed_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = ObjectStore(FolderStore(tmp_path / "store"))
    blob = objects.put_blob(b"weights")
    with ThreadPoolExecutor(1) as pool, deletion_notice(objects.store, [f"blobs/{blob}"]):
        publishing = pool.submit(objects.publish, "mask", blob, blob)
        while not objects.store.exists(f"keys/mask/{blob}"):
            assert not publishing.done()
        objects.store.remove(f"blobs/{blob}")
        # As if gc were killed here, so that it cannot remove such keys any more.
        monkeypatch.setattr("restitch.registry.store.attempts.process_began", lambda _pid: None)
        with pytest.raises(Unavailable, match="`restitch gc` or a purge has removed"):
            publishing.result()
    assert objects.lookup("mask", blob) is None


def test_an_act_whose_objects_were_removed_does_not_count(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path / "store")
    objects = ledger.objects
    with deletion_notice(objects.store, ["blobs/" + "0" * 64]):
        pass
    file = objects.put_blob(b"weights")
    there = objects.put_json({"files": {"model.safetensors": file}})
    lacks = objects.put_json({"files": {"model.safetensors": "0" * 64}})

    def register(manifest: str) -> None:
        found = model()
        ref = found.model.model_copy(update={"uri": f"store://{manifest}"})
        copied = found.model_copy(update={"model": ref})
        ledger.act("registered", "me", "why", lambda line_state: with_task(line_state, "t", copied))

    register(there)
    before = ledger.state()
    for manifest in ("0" * 64, lacks):
        with pytest.raises(Unavailable, match="has removed"):
            register(manifest)
    assert ledger.state() == before


def test_an_act_that_began_before_the_deletion_notice_starts_again(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path / "store")
    looked = []

    def change(line_state: Any) -> Any:
        looked.append(line_state.generation)
        if len(looked) == 1:
            ledger.touch()
        return line_state.with_pin(True)

    ledger.act("pinned", "me", "why", change)
    assert looked == [1, 2]
    assert ledger.state().pinned


def test_only_one_process_removes_at_a_time(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    with (
        deletion_notice(store, ["blobs/x"]),
        pytest.raises(Unavailable, match="is running"),
        deletion_notice(store, ["blobs/y"]),
    ):
        pass
    with deletion_notice(store, ["blobs/y"]):
        assert json.loads(store.read(STATE))["names"] == ["blobs/y"]
