"""A whole line whose store is a bucket: the same bytes, and workers that share only it."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from restitch.modeling.families.family import get_family
from restitch.registry.home import Home
from restitch.registry.s3 import retries
from restitch.registry.s3.store import S3Store
from restitch.registry.sources.resolve import resolve_source
from restitch.registry.store.folder import FolderStore
from restitch.registry.store.objects import ObjectStore
from restitch.serving.follower import Follower
from restitch.tasks.inputs.checkpoints import describe_model
from restitch.tasks.runtime.workspace import workspace
from tests.conftest import NewHome, Three
from tests.faulty_proxy import Faults, faulty_proxy
from tests.flows.storage.test_store_copy import contents
from tests.registry.sources.test_bucket import WEIGHTS, counting, upload
from tests.shell import Shell
from tests.worlds import SKILLS, World, copied, write_yaml

HEAD = "lines/demo/head.json"
pytestmark = pytest.mark.usefixtures("s3_account", "without_mlflow")


@pytest.fixture
def in_bucket(new_home: NewHome, s3_bucket: str, tmp_path: Path):
    """Make homes by name whose store is the same bucket."""

    def make(name: str) -> Shell:
        address = f"s3://{s3_bucket}/{tmp_path.name}"
        return Shell(new_home(name).home, {"RESTITCH_STORE": address})

    return make


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def moved(world: World, tmp_path: Path) -> World:
    """The world with models that may be deleted; its data stays where it is."""
    here = World(tmp_path / "world", world.family)
    for name in ("base", *SKILLS):
        folder = world.base if name == "base" else world.model(name)
        copied(folder, tmp_path / "world" / folder.relative_to(world.root))
    return here


def test_a_line_in_a_bucket_has_the_same_bytes_wherever_it_is_merged(
    in_bucket, three: Three, world: World, tmp_path: Path
) -> None:
    here = moved(world, tmp_path)
    first = in_bucket("first")
    line = world.line(tmp_path / "line.yaml", base=str(here.base))
    assert first.json("init", line)["base"].startswith("store://")
    assert first.json("init", line)["changes"] == []
    for name in SKILLS:
        first.json("register", "demo", "--task", world.task(name), "--model", here.model(name))
    assert first.patch_bytes() == three.shell.patch_bytes()
    assert not (first.home / "store").exists()

    # Another host has the bucket and none of the folders.
    shutil.rmtree(here.root)
    second = in_bucket("second")
    second("remerge", "demo", "--force")
    assert second.patch_bytes() == three.shell.patch_bytes()
    for shell, name in ((second, "out"), (three.shell, "expected")):
        shell("export", "demo", "champion", tmp_path / name)
    weights = [tmp_path / name / "model.safetensors" for name in ("out", "expected")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    home = Home(second.home, second.environment["RESTITCH_STORE"])
    for name in SKILLS:
        uri = second.state().tasks[name].versions[1].model.uri
        assert files(resolve_source(uri, home).local) == files(world.model(name))


def test_a_champion_in_a_bucket_is_followed_and_only_its_patch_is_fetched(
    in_bucket, world: World, s3_client: Any, s3_bucket: str, tmp_path: Path
) -> None:
    base = upload(s3_client, s3_bucket, world.base, f"{tmp_path.name}-base")
    team, server = in_bucket("team"), in_bucket("server")
    team("init", world.line(tmp_path / "line.yaml", base=base, retention=None))
    for name in SKILLS[:2]:
        file = write_yaml(tmp_path / f"{name}.yaml", {"task": name})
        team("register", "demo", "--task", file, "--model", world.model(name))
    folder = tmp_path / "followed"

    def look(version: int) -> tuple[dict[str, Any], Counter[str]]:
        if team.state().champion != version:
            team("rollback", "demo", version, "--reason", "a test")
        with counting() as fetched:
            found = server.json("follow", "demo", folder, "--once")
        team("export", "demo", version, tmp_path / "out", "--overwrite")
        expected = (tmp_path / "out" / WEIGHTS).read_bytes()
        assert (folder / "current" / WEIGHTS).read_bytes() == expected
        return found, fetched

    assert look(2)[0]["action"] == "exported"
    found, fetched = look(1)
    patch = team.ledger().merged(1).patch
    assert (found["action"], fetched[patch]) == ("updated", found["patch_bytes"])
    assert fetched[WEIGHTS] == 0, "the weights of the base are here already"
    with server.inside():
        follower = Follower("demo")
        team("rollback", "demo", 2, "--reason", "a test")
        with counting() as fetched:
            refreshed = follower.refresh()
        assert (refreshed.previous, refreshed.version) == (1, 2)
        assert fetched[WEIGHTS] == 0
        with follower.model() as one, Follower("demo").model() as other:
            theirs = dict(other.named_parameters())
            for name, value in one.named_parameters():
                assert torch.equal(value.view(torch.int32), theirs[name].view(torch.int32))


@pytest.mark.slow
def test_a_line_has_the_same_bytes_through_a_network_that_fails(
    in_bucket, three: Three, world: World, s3_url: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(retries, "_FIRST_WAIT", 0.002)
    with faulty_proxy(s3_url, Faults(seed=5)) as faults:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faults.url)
        first = in_bucket("first")
        first("init", world.line(tmp_path / "line.yaml"))
        for name in SKILLS:
            assert first.add(world, name)["state"] == "ready"
        second = in_bucket("second")
        second("remerge", "demo", "--force")
        assert sum(faults.injected.values()) > 20
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_url)
    assert second.patch_bytes() == three.shell.patch_bytes()
    assert first.kinds() == three.shell.kinds()
    first("verify", "demo")


def test_a_command_in_another_process_finds_the_bucket(
    in_bucket, world: World, tmp_path: Path
) -> None:
    shell = in_bucket("home")
    shell("init", world.line(tmp_path / "line.yaml"))
    assert "demo" in shell.process("status", "demo").out
    away = Shell(shell.home, {**shell.environment, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"})
    message = away.process("status", "demo", code=6).err
    assert "AWS_ENDPOINT_URL" in message
    assert "the-secret" not in message


def test_a_copy_that_was_asked_for_outlives_its_original(
    new_home: NewHome, three: Three, world: World, tmp_path: Path
) -> None:
    shell = new_home("home")
    shell("init", world.line(tmp_path / "line.yaml"))
    model = copied(world.model("colour"), tmp_path / "model")
    with shell.inside():
        space = workspace()
        ref = describe_model(str(model), get_family("text-encoder"), space, copy=True)
        again = describe_model(str(model), get_family("text-encoder"), space, copy=True)
        blobs = list(space.objects.store.list("blobs"))
        assert ref == again
        assert ref.weights == three.shell.state().tasks["colour"].versions[1].model.weights
        shutil.rmtree(model)
        shutil.rmtree(shell.home / "cache")
        assert files(resolve_source(ref.uri, space.home).local) == files(world.model("colour"))
        assert list(space.objects.store.list("blobs")) == blobs
    task = ("--task", world.task("colour"))
    assert shell.json("register", "demo", *task, "--model", ref.uri)["state"] == "ready"


def test_damage_at_the_server_is_found_past_the_cache_and_repaired(
    three: Three, s3_bucket: str, s3_client, in_bucket, tmp_path: Path
) -> None:
    shell = in_bucket("home")
    shell("store", "copy", three.shell.home / "store", shell.environment["RESTITCH_STORE"])
    store = S3Store(s3_bucket, tmp_path.name, tmp_path / "cache")
    before = contents(store)
    line_state = shell.state()
    record = shell.ledger().merged(2)
    # This machine gets whole copies of all of them.
    assert shell.json("verify", "demo")["intact"]
    damaged = [
        record.patch,
        record.members["colour"].delta,
        record.results["colour"].evaluations["base"],
    ]
    key = f"{tmp_path.name}/blobs"
    s3_client.put_object(Bucket=s3_bucket, Key=f"{key}/{damaged[0]}", Body=b"altered")
    s3_client.put_object(Bucket=s3_bucket, Key=f"{key}/{damaged[1]}", Body=b"")
    s3_client.delete_object(Bucket=s3_bucket, Key=f"{key}/{damaged[2]}")
    assert shell.json("verify", "demo")["intact"], "by the copies on this machine"
    found = shell.json("verify", "--deep", code=7)["store"]["damaged"]
    assert {each["object"] for each in found} == {f"blobs/{digest}" for digest in damaged}
    mended = shell.json("verify", "--repair")["store"]["damaged"]
    assert all(each["mended"] for each in mended)
    assert contents(store) == before
    # Another machine has no copies: it makes all of them again.
    other = in_bucket("other")
    s3_client.put_object(Bucket=s3_bucket, Key=f"{key}/{damaged[0]}", Body=b"altered")
    s3_client.delete_object(Bucket=s3_bucket, Key=f"{key}/{damaged[1]}")
    assert other.json("verify", "--repair")["intact"]
    assert contents(store) == before
    litter = ObjectStore(store).put_blob(b"litter")
    removed = shell.json("gc", "--older-than", "0s", "--yes")
    assert removed["names"] == [f"blobs/{litter}"]
    assert removed["bytes"] == 6
    store.remove("gc/state.json")
    found = contents(store)
    assert {**found, HEAD: b""} == {**before, HEAD: b""}
    assert shell.state().versions == line_state.versions


def test_a_store_comes_back_from_a_bucket_with_the_same_bytes(
    three: Three, s3_bucket: str, new_home: NewHome, tmp_path: Path
) -> None:
    shell = new_home("home")
    address = f"s3://{s3_bucket}/{tmp_path.name}"
    source = three.shell.home / "store"
    expected = contents(FolderStore(source))
    done = shell.json("store", "copy", source, address)
    assert done["lines"] == ["demo"]
    assert done["copied"] == len(expected) - 1
    assert contents(S3Store(s3_bucket, tmp_path.name, tmp_path / "cache")) == expected
    back = tmp_path / "back"
    shell("store", "copy", address, back)
    assert contents(FolderStore(back)) == expected
    again = shell.json("store", "copy", address, back)
    assert (again["copied"], again["there"]) == (0, len(expected) - 1)
    assert list((shell.home / "scratch").iterdir()) == [], "what was downloaded is still there"
    moved = Shell(new_home("moved").home, {"RESTITCH_STORE": str(back)})
    moved("verify", "demo")
    assert moved.head_bytes() == three.shell.head_bytes()
