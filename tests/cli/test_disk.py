"""No space, no permission, a file in the way: exit code 6, no change, and a retry succeeds."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import NewHome
from tests.shell import Shell
from tests.worlds import World

ALL = ["configured", "registered", "localized", "merged", "promoted"]
Mount = Callable[[Path, str], None]


@pytest.fixture
def mount() -> Iterator[Mount]:
    """Mount small disks of memory; skip the test if that is not allowed."""
    mounted: list[Path] = []

    def make(folder: Path, options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("disks cannot be mounted here")
        mounted.append(folder)

    yield make
    for folder in reversed(mounted):
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, left: int) -> Path:
    """Fill a disk except for about so many bytes."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as out:
        free = shutil.disk_usage(folder).free - left
        while free > 0:
            free -= out.write(bytes(min(free, 1 << 16)))
    return filler


def test_a_full_disk_changes_nothing_and_the_command_continues_when_there_is_space(
    world: World, new_home: NewHome, tmp_path: Path, mount: Mount, empty_mlflow: Path
) -> None:
    undisturbed = new_home("undisturbed")
    undisturbed("init", world.line(tmp_path / "line.yaml"))
    undisturbed.add(world, "colour")
    shell = Shell(tmp_path / "small")
    mount(shell.home, "size=24m")
    shutil.copyfile(empty_mlflow, shell.home / "mlflow.db")
    shell("init", tmp_path / "line.yaml")
    files = ("--task", world.task("colour"), "--model", world.model("colour"))
    refused = 0
    for left in (0, 8_192, 24_576, 49_152, 98_304):
        before, filler = shell.head_bytes(), fill(shell.home, left)
        done = shell("register", "demo", *files, code=None)
        assert done.code in (0, 6), done.err
        if done.code == 6:
            refused += 1
            assert "space" in done.err or "full" in done.err
        if left == 0:
            assert shell.head_bytes() == before
        filler.unlink()
    assert refused
    shell("register", "demo", *files)
    assert shell.patch_bytes() == undisturbed.patch_bytes()
    assert shell.kinds() == undisturbed.kinds()


@pytest.mark.usefixtures("without_mlflow")
def test_a_disk_that_is_full_at_any_write_changes_nothing(
    world: World, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fail the n-th durable write, for every n until the command succeeds."""
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    real = os.fsync
    files = ("--task", world.task("colour"), "--model", world.model("colour"))
    codes = []
    for number in range(200):
        calls = 0

        def fsync(descriptor: int, number: int = number) -> None:
            nonlocal calls
            calls += 1
            if calls > number:
                raise OSError(28, "No space left on device")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        codes.append(shell("register", "demo", *files, code=None).code)
        monkeypatch.setattr(os, "fsync", real)
        kinds = shell.kinds()
        assert (
            kinds == ["configured", "registered", "localized", "merged", "promoted"][: len(kinds)]
        )
        if codes[-1] == 0:
            break
    assert codes[-1] == 0
    assert set(codes[:-1]) == {6}
    assert len(codes) > 5
    assert shell("remerge", "demo", "--json").json["action"] == "unchanged"


@pytest.mark.usefixtures("without_mlflow")  # it would keep its database open
def test_a_read_only_home_can_be_looked_at_and_not_changed(
    world: World, tmp_path: Path, mount: Mount
) -> None:
    shell = Shell(tmp_path / "mounted")
    mount(shell.home, "size=24m")
    shell("init", world.line(tmp_path / "line.yaml"))
    subprocess.run(["mount", "-o", "remount,ro", str(shell.home)], check=True)
    for look in (("status",), ("status", "demo"), ("history", "demo")):
        shell(*look)
    for command in (
        ("init", tmp_path / "line.yaml"),
        ("remerge", "demo"),
        ("register", "demo", "--task", world.task("colour"), "--model", world.model("colour")),
    ):
        done = shell(*command, code=6)
        assert str(shell.home) in done.err.replace("\n", "")


@pytest.mark.usefixtures("without_mlflow")
@pytest.mark.parametrize("place", ["", "store", "scratch", "store/blobs", "store/lines", "locks"])
def test_a_file_in_the_way_of_a_folder_is_named(world: World, tmp_path: Path, place: str) -> None:
    shell = Shell(tmp_path / "home")
    (shell.home / place).parent.mkdir(parents=True, exist_ok=True)
    (shell.home / place).write_text("in the way")
    files = ("--task", world.task("colour"), "--model", world.model("colour"))
    done = shell("init", world.line(tmp_path / "line.yaml"), code=None)
    if place == "locks":
        assert done.code == 0
        done = shell("register", "demo", *files, code=6)
    assert done.code == 6
    assert str(shell.home / place) in done.err.replace("\n", "")
    assert (shell.home / place).read_text() == "in the way"


@pytest.mark.usefixtures("without_mlflow")
def test_looking_leaves_no_trace(tmp_path: Path) -> None:
    shell = Shell(tmp_path / "home")
    assert shell.json("status")["lines"] == []
    shell("history", "demo", code=3)
    assert not shell.home.exists()


@pytest.mark.usefixtures("without_mlflow")
def test_an_export_to_an_unwritable_folder_is_refused(
    three: Any, tmp_path: Path, mount: Mount
) -> None:
    (tmp_path / "file").write_text("")
    done = three.shell("export", "demo", "champion", tmp_path / "file" / "out", code=6)
    assert str(tmp_path / "file") in done.err.replace("\n", "")
    mount(tmp_path / "disk", "size=64k")
    fill(tmp_path / "disk", 20_000)
    done = three.shell("export", "demo", "champion", tmp_path / "disk" / "out", code=6)
    assert "space" in done.err
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["filler"]
