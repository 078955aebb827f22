"""A copied store has the same bytes, also after a kill, and replaces nothing in the target."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from restitch.registry.home import Home
from restitch.registry.store.base import Store
from restitch.registry.store.folder import FolderStore
from tests.conftest import NewHome, Three
from tests.shell import ROOT

pytestmark = pytest.mark.usefixtures("without_mlflow")


@pytest.fixture
def source(three: Three) -> str:
    return str(three.shell.home / "store")


def contents(store: Store) -> dict[str, bytes]:
    return {name: store.read(name) for name in store.list() if not name.startswith("leases/")}


KILLED = """
import os, sys
from pathlib import Path
from restitch.registry.store.folder import FolderStore
put, swap, calls = FolderStore.put, FolderStore.swap, []
def dies(real):
    def call(*arguments, **given):
        calls.append(1)
        if len(calls) > int(sys.argv[3]):
            os.kill(os.getpid(), 9)
        return real(*arguments, **given)
    return call
FolderStore.put, FolderStore.swap = dies(put), dies(swap)
from restitch.flows.storage.store_copy import copy_store
copy_store(sys.argv[1], sys.argv[2])
"""


def test_a_killed_copy_has_no_line_with_missing_objects_and_continues(
    source: str, new_home: NewHome, tmp_path: Path
) -> None:
    shell = new_home("home")
    expected = contents(FolderStore(Path(source)))

    def kill(target: Path, calls: int) -> None:
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, source, str(target), str(calls)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "RESTITCH_HOME": str(shell.home)},
            capture_output=True,
            text=True,
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        found = contents(FolderStore(target))
        assert found.items() <= expected.items()
        assert not [name for name in found if name.startswith("lines/")]

    target = tmp_path / "target"
    for calls in (0, 3, len(expected) // 2):
        kill(target, calls)
    done = shell.json("store", "copy", source, target)
    assert done["there"] > len(expected) // 4
    assert contents(FolderStore(target)) == expected
    last = tmp_path / "last"
    kill(last, len(expected) - 1)  # at the state of the line
    assert shell.json("store", "copy", source, last)["copied"] == 0
    assert contents(FolderStore(last)) == expected


def test_an_older_copy_is_brought_up_to_date(
    source: str, new_home: NewHome, tmp_path: Path
) -> None:
    shell = new_home("home")
    shutil.copytree(source, shell.home / "store")
    target = tmp_path / "target"
    shell("store", "copy", shell.home / "store", target)
    shell("pin", "demo", "--reason", "a change")
    done = shell.json("store", "copy", shell.home / "store", target)
    assert done["copied"] == 1, "the act"
    assert contents(FolderStore(target)) == contents(FolderStore(shell.home / "store"))
    # And never the other way round.
    output = shell("store", "copy", source, target, code=3).err
    assert "holds a different line demo" in output


def test_a_damaged_object_is_named_and_no_line_is_copied(
    source: str, new_home: NewHome, tmp_path: Path
) -> None:
    shell = new_home("home")
    shutil.copytree(source, shell.home / "store")
    blobs = sorted((shell.home / "store" / "blobs").iterdir())
    blobs[0].write_bytes(b"altered")
    target = FolderStore(tmp_path / "target")
    output = shell("store", "copy", shell.home / "store", target.root, code=7).err
    assert blobs[0].name in output
    assert "lines/demo/head.json" not in list(target.list())
    assert len(list(target.list("blobs"))) == len(blobs) - 1


def test_the_store_of_another_installation_is_not_changed(
    source: str, new_home: NewHome, tmp_path: Path
) -> None:
    shell = new_home("home")
    target = FolderStore(tmp_path / "target")
    name = next(iter(FolderStore(Path(source)).list("keys")))
    target.put(name, b"{}")
    assert f"holds a different {name}" in shell("store", "copy", source, target.root, code=3).err
    assert target.read(name) == b"{}"
    assert "lines/demo/head.json" not in list(target.list())


def test_invalid_addresses_are_refused(source: str, new_home: NewHome, tmp_path: Path) -> None:
    shell = new_home("home")
    assert "no line" in shell("store", "copy", tmp_path / "nothing", tmp_path / "x", code=3).err
    assert "no line" in shell("store", "copy", Path(source).parent, tmp_path / "x", code=3).err
    assert "to itself" in shell("store", "copy", source, f"{source}/", code=3).err
    output = shell("store", "copy", source, "s3://key:pass-word@bucket/x", code=3).err
    assert "pass-word" not in output
    assert not (tmp_path / "x").exists()


def test_merge_leases_are_not_copied(source: str, new_home: NewHome, tmp_path: Path) -> None:
    shell = new_home("home")
    shutil.copytree(source, shell.home / "store")
    store = Home(shell.home).open_store()
    store.swap("leases/demo.merge.json", None, json.dumps({"pid": 1}).encode())
    shell("store", "copy", shell.home / "store", tmp_path / "target")
    assert list(FolderStore(tmp_path / "target").list("leases")) == []
