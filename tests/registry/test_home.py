import os
import subprocess
import sys
import time

import pytest

from restitch.merging.errors import BadInput, Unavailable
from restitch.registry.home import Home, prepare_environment
from restitch.registry.s3.store import S3Store
from tests.hub_server import ROOT


def test_everything_lies_under_one_folder(tmp_path):
    home = Home.from_environment({"RESTITCH_HOME": str(tmp_path / "home")})
    home.create()
    for path in (home.store_path, home.cache, home.scratch, home.mlartifacts):
        assert path.is_relative_to(tmp_path / "home")
    assert home.mlflow_uri == f"sqlite:///{tmp_path}/home/mlflow.db"
    assert home.owns_mlflow


def test_the_default_is_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Home.from_environment({}).root == tmp_path / ".restitch"
    assert not (tmp_path / ".restitch").exists()


def test_the_environment_may_name_another_store_and_server(tmp_path):
    home = Home.from_environment(
        {"RESTITCH_STORE": str(tmp_path / "s"), "MLFLOW_TRACKING_URI": "http://127.0.0.1:5000"}
    )
    assert home.store_path == tmp_path / "s"
    assert home.mlflow_uri == "http://127.0.0.1:5000"
    assert not home.owns_mlflow
    assert Home(tmp_path, f"file://{tmp_path}/s").store_path == tmp_path / "s"


def test_an_unsupported_store_is_refused_without_its_address(tmp_path):
    with pytest.raises(BadInput, match="RESTITCH_STORE") as raised:
        Home(tmp_path, "s3://key:secret@bucket/prefix").open_store()
    assert "secret" not in str(raised.value)


def test_a_bucket_is_a_store_whose_copies_lie_in_the_cache(tmp_path, s3_bucket):
    home = Home(tmp_path, f"s3://{s3_bucket}/a/prefix")
    store = home.open_store()
    assert isinstance(store, S3Store)
    assert (store.bucket, store.prefix) == (s3_bucket, "a/prefix")
    assert store.cache.root == home.cache / "store"
    assert not home.store_is_local
    assert Home(tmp_path).store_is_local
    assert Home(tmp_path, f"file://{tmp_path}/s").store_is_local
    for look in (lambda: home.store_path, Home(tmp_path, "gs://bucket/prefix").open_store):
        with pytest.raises(BadInput, match="RESTITCH_STORE"):
            look()


def test_credentials_of_the_bucket_stay_in_the_environment(tmp_path):
    account = {"AWS_ACCESS_KEY_ID": "x", "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    added = prepare_environment(Home(tmp_path, "s3://bucket/prefix"), {**account})
    assert not any(name.startswith("AWS_") or name == "HOME" for name in added)


def test_a_home_that_cannot_be_created_is_an_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Unavailable, match="in the way"):
        Home(tmp_path / "file" / "home").create()


def test_leftovers_of_killed_work_are_swept_by_their_newest_file(tmp_path):
    home = Home(tmp_path)
    home.create()
    old = time.time() - 7200
    for name in ("dead", "alive"):
        folder = home.scratch / name
        folder.mkdir()
        (folder / "part").write_bytes(b"")
        for path in (folder / "part", folder):
            os.utime(path, (old, old))
    (home.scratch / "alive" / "part").write_bytes(b"more")
    os.utime(home.scratch / "alive", (old, old))
    building = home.cache / "sources" / ".tmp" / "x"
    building.mkdir(parents=True)
    (home.cache / "sources" / "whole").mkdir()
    for path in (building, home.cache / "sources" / "whole"):
        os.utime(path, (old, old))
    assert home.sweep(older_than=3600) == 2
    assert [path.name for path in home.scratch.iterdir()] == ["alive"]
    assert [path.name for path in (home.cache / "sources").rglob("[!.]*")] == ["whole"]


def test_variables_that_are_set_are_respected(tmp_path):
    environment = {"PREFECT_HOME": "/mine"}
    added = prepare_environment(Home(tmp_path), environment)
    assert environment["PREFECT_HOME"] == "/mine"
    assert "PREFECT_HOME" not in added
    assert added["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert prepare_environment(Home(tmp_path), environment) == {}


def test_moving_the_caches_does_not_log_the_user_out(tmp_path):
    token = tmp_path / "user" / ".cache" / "huggingface" / "token"
    token.parent.mkdir(parents=True)
    token.write_text("hf_x")
    environment = {"HOME": str(tmp_path / "user")}
    prepare_environment(Home(tmp_path / "home"), environment)
    assert environment["HF_TOKEN_PATH"] == str(token)


def test_looking_at_a_line_imports_nothing_heavy():
    code = """
import sys
import restitch.registry.home, restitch.registry.ledger.ledger, restitch.registry.specs.line
import restitch.registry.mlflow.sync, restitch.registry.sources.resolve
heavy = {"torch", "mlflow", "prefect", "transformers", "datasets", "boto3", "huggingface_hub"}
print(*sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
