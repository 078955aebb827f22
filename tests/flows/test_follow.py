"""A folder that follows a line: complete versions, links, and errors that change nothing."""

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel, BertModel

from restitch.flows import follow as module
from restitch.flows.follow import FollowOutcome, follow
from restitch.merging.errors import Damage, Unavailable
from restitch.registry.store.folder import FolderStore
from tests.conftest import leave_mlflow_alone
from tests.shell import Shell
from tests.worlds import SKILLS, World, write_yaml

pytestmark = pytest.mark.usefixtures("without_mlflow")

FACTS = ".follow.json"


@pytest.fixture(scope="module")
def source(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A line with four versions, on a base in shards of which one holds no block; read only."""
    root = tmp_path_factory.mktemp("followed")
    with pytest.MonkeyPatch.context() as patch:
        leave_mlflow_alone(patch)
        shell = Shell(root / "home")
        make_line(shell, world, root, {**{name: name for name in SKILLS}, "colour-2": "colour"})
        yield shell


def make_line(
    shell: Shell, world: World, root: Path, models: dict[str, str], **changes: Any
) -> None:
    """Make a version without data after each of the models, on a base in shards."""
    base = root / "base"
    BertModel.from_pretrained(world.base).save_pretrained(base, max_shard_size="8KB")
    for file in world.base.iterdir():
        if not file.name.startswith("model"):
            shutil.copyfile(file, base / file.name)
    shell("init", world.line(root / "line.yaml", base=str(base), retention=None, **changes))
    for model, task in models.items():
        file = write_yaml(root / f"{task}.yaml", {"task": task})
        shell("register", "demo", "--task", file, "--model", world.model(model))


@pytest.fixture
def shell(source: Shell, tmp_path: Path) -> Shell:
    shutil.copytree(source.home, tmp_path / "home")
    return Shell(tmp_path / "home")


def use(shell: Shell, version: int) -> None:
    if shell.state().champion != version:
        shell("rollback", "demo", version, "--reason", "a test")


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != FACTS
    }


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(folder).items() if name.endswith(".safetensors")}


def exported(shell: Shell, version: int, folder: Path) -> dict[str, bytes]:
    shell("export", "demo", version, folder, "--overwrite")
    return files(folder)


def look(shell: Shell, folder: Path, *options: object, code: int = 0) -> Any:
    done = shell("follow", "demo", folder, "--once", "--json", *options, code=code)
    return json.loads(done.out) if code == 0 else done.err


def kept(folder: Path) -> set[str]:
    return {path.name for path in (folder / "versions").iterdir()}


def test_the_folder_is_the_export_and_unchanged_shards_are_links(
    shell: Shell, tmp_path: Path
) -> None:
    folder = tmp_path / "served"
    for version in (1, 2, 3, 4):
        use(shell, version)
        found = look(shell, folder)
        assert files(folder / "current") == exported(shell, version, tmp_path / "export")
        shards = {name for name in files(folder / "current") if name.startswith("model-")}
        links = {n for n in shards if (folder / "current" / n).stat().st_nlink > 1}
        assert found["version"] == version
        if version == 1:
            assert (found["action"], found["previous"], links) == ("exported", None, set())
        else:
            assert (found["action"], found["previous"]) == ("updated", version - 1)
            assert set(found["taken"]) == links
            assert links
            assert links < shards
        written = {"model.safetensors.index.json", *found["written"]}
        assert shards - links <= written
        assert found["bytes_written"] == sum(
            (folder / "current" / name).stat().st_size for name in found["written"]
        )
        again = look(shell, folder)
        assert (again["action"], again["written"]) == ("unchanged", [])
    assert kept(folder) == {"3", "4"}
    assert (folder / "current").readlink() == Path("versions/4")
    AutoModel.from_pretrained(folder / "current")


def test_a_version_that_is_still_there_is_used_again(shell: Shell, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    for version in (2, 3):
        use(shell, version)
        look(shell, folder)
    use(shell, 2)
    back = look(shell, folder)
    assert (back["action"], back["written"], back["patch_bytes"]) == ("switched", [], 0)
    assert files(folder / "current")
    assert kept(folder) == {"2", "3"}
    use(shell, 4)
    look(shell, folder)
    assert kept(folder) == {"2", "4"}, "the version that was in use before is kept"


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM])
def test_shards_are_copied_where_there_are_no_links(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    folder = tmp_path / "served"
    use(shell, 2)
    look(shell, folder)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    use(shell, 3)
    monkeypatch.setattr(os, "link", refuse)
    found = look(shell, folder)
    monkeypatch.undo()
    assert found["taken"]
    assert files(folder / "current") == exported(shell, 3, tmp_path / "export")
    for name in found["taken"]:
        assert (folder / "current" / name).stat().st_nlink == 1


def test_a_shard_that_somebody_changed_is_not_taken(shell: Shell, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    use(shell, 2)
    look(shell, folder)
    for path in (folder / "current").glob("model-*.safetensors"):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    use(shell, 3)
    done = shell("follow", "demo", folder, "--once")
    assert "were changed on the disk" in done.err
    assert files(folder / "current") == exported(shell, 3, tmp_path / "export")


@pytest.mark.parametrize("lost", ["config.json", "model-00001-of-00004.safetensors", FACTS])
def test_a_folder_that_lost_a_file_is_written_again(
    shell: Shell, tmp_path: Path, lost: str
) -> None:
    folder = tmp_path / "served"
    look(shell, folder)
    (folder / "current" / lost).unlink()
    done = shell("follow", "demo", folder, "--once")
    assert "is written again" in done.err
    assert files(folder / "current") == exported(shell, 4, tmp_path / "export")
    assert kept(folder) == {"4.2"}
    assert look(shell, folder)["action"] == "unchanged"


def test_the_command_runs_after_each_switch_and_again_until_it_succeeds(
    shell: Shell, tmp_path: Path
) -> None:
    folder, said = tmp_path / "served", tmp_path / "said"
    says = f"echo $RESTITCH_LINE $RESTITCH_VERSION $RESTITCH_FOLDER >> {said}"
    use(shell, 2)
    assert look(shell, folder, "--exec", says)["command"] is True
    assert look(shell, folder, "--exec", says)["command"] is False
    use(shell, 3)
    assert "exit code 4" in look(shell, folder, "--exec", "exit 4", code=6)
    assert (folder / "current").readlink().name == "3", "the folder is switched"
    assert look(shell, folder, "--exec", f"echo printed; {says}")["command"] is True
    lines = [f"demo {version} {folder / 'current'}" for version in (2, 3)]
    assert said.read_text().splitlines() == lines


def damaged(shell: Shell, version: int) -> None:
    blob = shell.home / "store" / "blobs" / shell.ledger().merged(version).patch
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_a_damaged_patch_writes_nothing(shell: Shell, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    damaged(shell, 4)
    assert "damaged" in look(shell, folder, code=7)
    assert not (folder / "current").exists()
    use(shell, 2)
    look(shell, folder)
    before = files(folder)
    use(shell, 4)
    error = look(shell, folder, code=7)
    assert f"{folder / 'current'} stays at version 2, merged 20" in error
    assert files(folder) == before
    assert kept(folder) == {"2"}


def test_a_store_that_is_away_leaves_the_version_in_use(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "served"
    use(shell, 2)
    look(shell, folder)
    before = files(folder)
    (shell.home / "store").rename(tmp_path / "away")
    error = look(shell, folder, code=6)
    assert "does not have line demo any more" in error
    assert f"{folder / 'current'} stays at version 2, merged 20" in error
    (tmp_path / "away").rename(shell.home / "store")

    def refuse(self: FolderStore, name: str) -> bytes:
        raise Unavailable(f"cannot reach {self.address}", hint="wait")

    monkeypatch.setattr(FolderStore, "read", refuse)
    error = look(shell, folder, code=6)
    assert "cannot reach" in error
    assert "stays at version 2" in error
    assert files(folder) == before


def test_a_folder_of_something_else_is_refused_and_stays(shell: Shell, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    assert "follows no line" in look(shell, other, code=3)
    assert [path.name for path in other.iterdir()] == ["notes.txt"]
    assert "is not a folder" in look(shell, other / "notes.txt", code=3)
    followed = tmp_path / "served"
    look(shell, followed)
    error = look(shell, followed, "--alias", "candidate", code=3)
    assert "follows the champion of line demo" in error
    state = followed / "follow.json"
    state.write_text("{")
    assert str(state) in look(shell, followed, code=3)


def test_a_line_or_version_that_does_not_exist_makes_no_folder(
    shell: Shell, tmp_path: Path
) -> None:
    folder = tmp_path / "served"
    done = shell("follow", "absent", folder, "--once", code=3)
    assert "there is no line 'absent'" in done.err
    assert "line demo has no candidate" in look(shell, folder, "--alias", "candidate", code=3)
    assert not folder.exists()
    shell("follow", "demo", folder, "--once", "--every", 5, code=2)


def looks(
    shell: Shell, folder: Path, steps: list[Any], monkeypatch: pytest.MonkeyPatch
) -> list[FollowOutcome]:
    """Follow with a step before each look after the first one, and stop after the last."""

    remaining = iter(steps)

    def step(_: float) -> None:
        action = next(remaining, None)
        if action is None:
            raise StopAsyncIteration
        action()

    monkeypatch.setattr(time, "sleep", step)
    found: list[FollowOutcome] = []
    with shell.inside(), pytest.raises(StopAsyncIteration):
        found.extend(follow("demo", folder))
    return found


def test_following_reports_changes_and_survives_a_store_that_is_away(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(shell, 1)
    store, away = shell.home / "store", tmp_path / "away"
    warnings: list[str] = []
    monkeypatch.setattr(module, "warn", warnings.append)

    def come_back() -> None:
        away.rename(store)
        use(shell, 3)

    steps = [
        lambda: None,
        lambda: use(shell, 2),
        lambda: store.rename(away),
        lambda: None,
        come_back,
    ]
    found = looks(shell, tmp_path / "served", steps, monkeypatch)
    assert [(each.version, each.action) for each in found] == [
        (1, "exported"),
        (2, "updated"),
        (3, "updated"),
    ]
    (warning,) = warnings
    assert "stays at version 2" in warning


def test_following_ends_with_the_error_of_a_damaged_patch(shell: Shell, tmp_path: Path) -> None:
    damaged(shell, 4)
    with shell.inside(), pytest.raises(Damage):
        next(follow("demo", tmp_path / "served"))


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "tsv-m", "localize": {"mode": "subspace", "rank": 0.25}},
        {"method": "task-arithmetic", "localize": {"density": 1.0}},
    ],
    ids=["subspaces", "whole"],
)
def test_lines_of_subspaces_and_of_whole_task_vectors_are_followed(
    world: World, tmp_path: Path, changes: dict[str, Any]
) -> None:
    shell, folder = Shell(tmp_path / "home"), tmp_path / "served"
    make_line(shell, world, tmp_path, {name: name for name in SKILLS[:2]}, **changes)
    for version in (2, 1):
        use(shell, version)
        found = look(shell, folder)
        assert files(folder / "current") == exported(shell, version, tmp_path / "export")
    assert found["taken"]
