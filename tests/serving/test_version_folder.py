"""A served version's folder is complete, verified, and never half written."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from restitch.merging.errors import BadInput, Damage, Unavailable
from restitch.merging.files.checkpoint import Checkpoint
from restitch.registry.home import Home
from restitch.serving.served_version import ServedVersion, read_version
from restitch.serving.version_folder import version_folder
from tests.conftest import Three


@pytest.fixture
def home(three: Three, tmp_path: Path) -> Iterator[Home]:
    """The home of a machine that serves, with a copy of the line's store."""
    store = shutil.copytree(three.shell.home / "store", tmp_path / "store")
    with patch.dict(os.environ, {"RESTITCH_HOME": str(tmp_path / "serving")}):
        yield replace(Home.from_environment(), store_url=str(store))


def test_a_version_comes_from_the_store_as_an_export_does(
    three: Three, home: Home, tmp_path: Path
) -> None:
    version = read_version(home, "demo")
    folder = version_folder(version)
    three.shell("export", "demo", "champion", tmp_path / "out")
    exported = {p.name: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    served = {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert served.keys() - exported.keys() == {"restitch.cached.json"}
    assert exported.keys() - served.keys() == {"README.md"}
    assert {n: d for n, d in served.items() if n in exported} == {
        n: d for n, d in exported.items() if n in served
    }
    assert ServedVersion.model_validate_json(version.model_dump_json()) == version


def test_the_folder_is_written_once_and_again_when_it_is_damaged(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    version = read_version(home, "demo")
    folder = version_folder(version)
    weights = folder / "model.safetensors"
    before, digest = weights.stat().st_ino, Checkpoint.open(folder).digest()
    assert version_folder(version) == folder
    assert weights.stat().st_ino == before
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    assert version_folder(version) == folder
    assert Checkpoint.open(folder).digest() == digest
    assert "is damaged: it is written again" in caplog.text


def test_a_damaged_patch_leaves_nothing(home: Home) -> None:
    version = read_version(home, "demo")
    patch_file = home.store_path / "blobs" / version.patch
    patch_file.chmod(0o644)
    patch_file.write_bytes(patch_file.read_bytes()[:-1] + b"?")
    with pytest.raises(Damage) as refused:
        version_folder(version)
    assert refused.value.exit_code == 7
    assert version.patch in str(refused.value)
    cache = home.cache / "sources"
    assert not [path for path in cache.rglob("*") if path.is_file() and path.name[0] != "."]


def test_without_the_store_the_cached_version_is_used_and_its_date_stated(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    version = read_version(home, "demo")
    folder = version_folder(version)
    home.store_path.rename(home.store_path.with_name("away"))
    assert read_version(home, "demo") == version
    assert "cannot be reached" in caplog.text
    assert f"version {version.version} of line demo is used, which was the champion" in caplog.text
    caplog.clear()
    assert version_folder(version) == folder
    assert f"the folder of version {version.version} of line demo from 20" in caplog.text


def test_without_store_and_cache_the_message_says_what_to_do(home: Home) -> None:
    version = read_version(home, "demo")
    home.store_path.rename(home.store_path.with_name("away"))
    with pytest.raises(Unavailable, match="remerge demo --republish"):
        version_folder(version)


def test_a_purged_version_is_not_served_from_the_cache(home: Home) -> None:
    version = read_version(home, "demo")
    version_folder(version)
    (home.store_path / "blobs" / version.patch).unlink()
    with pytest.raises(BadInput, match="is not in the store any more"):
        version_folder(version)


def test_a_changed_base_is_refused(home: Home) -> None:
    version = read_version(home, "demo")
    other = version.model_copy(
        update={"base": version.base.model_copy(update={"config": "0" * 64})}
    )
    with pytest.raises(BadInput, match="the configuration files of"):
        version_folder(other)
