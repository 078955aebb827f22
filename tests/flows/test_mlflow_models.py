"""MLflow holds a model of every merged version, and the weights of the versions that keep them."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import boto3
import mlflow.pyfunc
import mlflow.transformers
import pandas as pd
import pytest
import torch
import yaml
from mlflow import MlflowClient
from mlflow.models import Model
from safetensors.torch import load_file

from tests.conftest import NewHome
from tests.servers import s3_server
from tests.shell import Shell
from tests.worlds import World

SECRET = "a-secret-password"


def client_of(shell: Shell) -> MlflowClient:
    address = f"sqlite:///{shell.home / 'mlflow.db'}"
    return MlflowClient(tracking_uri=address, registry_uri=address)


def files_of(shell: Shell, version: int) -> Path:
    """The folder with the MLflow model of a version."""
    shown = client_of(shell).get_model_version("demo", str(version))
    run = client_of(shell).get_run(shown.run_id)
    return Path(run.info.artifact_uri.removeprefix("file://"), "restitch")


def flavors(shell: Shell, version: int) -> set[str]:
    return set(Model.load(str(files_of(shell, version) / "MLmodel")).flavors)


def with_weights(shell: Shell) -> list[int]:
    shown = client_of(shell).get_registered_model("demo").tags.get("restitch.weights", "")
    listed = [int(number) for number in shown.split(",") if number]
    versions = sorted(shell.state().versions)
    for version in versions:
        there = {path.name for path in files_of(shell, version).iterdir() if path.is_dir()}
        expected = {"model", "components"} if version in listed else set()
        assert there == expected, version
        both = {"python_function", "transformers"}
        assert flavors(shell, version) == (both if version in listed else {"python_function"})
    return listed


@pytest.fixture
def shell(new_home: NewHome, world: World, tmp_path: Path) -> Shell:
    """A line with one champion."""
    shell = new_home("home")
    shell("init", world.line(tmp_path / "line.yaml", gates=None, retention=None))
    shell.add(world, "colour")
    return shell


def test_the_weights_follow_the_champion(shell: Shell, world: World, tmp_path: Path) -> None:
    assert with_weights(shell) == [1]
    shell.add(world, "number")
    assert shell.state().champion == 2
    assert with_weights(shell) == [2]
    shell("export", "demo", "champion", tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    kept = load_file(files_of(shell, 2) / "model" / "model.safetensors")
    assert exported.keys() == kept.keys()
    assert all(torch.equal(kept[name], exported[name]) for name in exported)
    shell("rollback", "demo", "1", "--reason", "a test")
    assert shell.state().champion == 1
    assert with_weights(shell) == [1]


def test_mlflow_users_load_the_champion(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shell.home / 'mlflow.db'}")
    monkeypatch.setenv("RESTITCH_HOME", str(tmp_path / "elsewhere"))
    model = mlflow.pyfunc.load_model("models:/demo@champion")
    found = model.predict(pd.DataFrame({"text": ["one"]}), params={"task": "colour"})
    assert found["label"][0] in ("red", "green", "blue")
    pipeline = mlflow.transformers.load_model("models:/demo@champion")
    assert type(pipeline.model).__name__ == "BertModel"


def test_a_line_chooses_whose_weights_are_kept(shell: Shell, world: World, tmp_path: Path) -> None:
    for weights, expected in (("none", []), ("all", [1]), ("champion", [1])):
        changed = world.line(
            tmp_path / "line.yaml", gates=None, retention=None, mlflow={"weights": weights}
        )
        shell("init", changed)
        assert with_weights(shell) == expected, weights
    shell.add(world, "number")
    all_of_them = world.line(
        tmp_path / "line.yaml", gates=None, retention=None, mlflow={"weights": "all"}
    )
    shell("init", all_of_them)
    assert with_weights(shell) == [1, 2]


def test_the_new_key_does_not_change_the_digest_of_a_line_without_it(shell: Shell) -> None:
    spec = shell.state().spec
    assert spec.mlflow.weights == "champion"
    assert spec.digest == spec.model_copy(update={"mlflow": type(spec.mlflow)()}).digest
    assert "mlflow" not in spec.model_dump(exclude_defaults=True)


def test_versions_of_before_are_published_again(shell: Shell) -> None:
    folder = files_of(shell, 1)
    for path in (folder / "model", folder / "components"):
        shutil.rmtree(path)
    for path in folder.iterdir():
        if path.name != "object.json":
            path.unlink()
    client_of(shell).delete_registered_model_tag("demo", "restitch.weights")
    before = shell.head_bytes()
    shell("remerge", "demo", "--republish")
    assert with_weights(shell) == [1]
    assert shell.head_bytes() == before


def test_verify_finds_and_repairs_weights_that_are_missing(shell: Shell) -> None:
    shell("verify", "--deep")
    shutil.rmtree(files_of(shell, 1) / "model")
    found = shell("verify", "--deep", code=7)
    assert "the weights of version 1 are missing" in found.out
    shell("verify", "--repair", code=None)
    assert with_weights(shell) == [1]
    shell("verify", "--deep")


def test_verify_finds_and_repairs_weights_with_other_bytes(shell: Shell) -> None:
    assert shell.json("verify", "--deep")["store"]["mlflow_weights"] == 1
    weights = files_of(shell, 1) / "model" / "model.safetensors"
    tokenizer = files_of(shell, 1) / "components" / "tokenizer" / "tokenizer.json"
    before = weights.read_bytes()
    for file, message in (
        (weights, "the weights of version 1 differ from base and patch in 1 tensor: "),
        (tokenizer, "the weights of version 1 have another configuration, tokenizer or processor"),
    ):
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert message in shell("verify", "--deep", code=7).out
        file.write_bytes(data)
    weights.write_bytes(before[:-1])
    assert "the weights of version 1 cannot be read: " in shell("verify", "--deep", code=7).out
    shell("verify", "--repair", code=None)
    assert weights.read_bytes() == before
    shell("verify", "--deep")


def test_a_full_disk_costs_the_weights_and_not_the_champion(
    new_home: NewHome, world: World, tmp_path: Path
) -> None:
    shell = new_home("full")
    shell("init", world.line(tmp_path / "line.yaml", gates=None, retention=None))
    full = OSError(errno.ENOSPC, "No space left on device")
    with patch("restitch.serving.version_folder.export_weights", side_effect=full):
        done = shell(
            *("register", "demo", "--task", world.task("colour")),
            *("--model", world.model("colour")),
        )
    assert "the weights of version 1 in MLflow are not up to date until the next remerge" in (
        " ".join(done.err.split()) + " ".join(done.out.split())
    )
    client = client_of(shell)
    assert client.get_model_version_by_alias("demo", "champion").version == 1
    assert with_weights(shell) == []
    shell("remerge", "demo")
    assert with_weights(shell) == [1]


def test_the_artifact_holds_no_secret(
    new_home: NewHome, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    shell = new_home("home")
    shell("init", world.line(tmp_path / "line.yaml", gates=None, retention=None))
    shell.add(world, "colour")
    data = b"".join(p.read_bytes() for p in files_of(shell, 1).rglob("*") if p.is_file())
    assert SECRET.encode() not in data
    described: Any = json.loads((files_of(shell, 1) / "restitch_version.json").read_bytes())
    assert described["store"] == str(shell.home / "store")
    assert (
        yaml.safe_load((files_of(shell, 1) / "MLmodel").read_bytes())["metadata"]["restitch"][
            "record"
        ]
        == described["record"]
    )


def test_with_a_bucket_the_source_is_the_model_in_the_bucket(
    new_home: NewHome, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server(tmp_path / "s3") as url:
        account = {
            "AWS_ACCESS_KEY_ID": "the-key-id",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": url,
        }
        for name, value in account.items():
            monkeypatch.setenv(name, value)
        bucket = boto3.client("s3", endpoint_url=url)
        bucket.create_bucket(Bucket="bucket")
        shell = new_home("home")
        shell = Shell(shell.home, {"RESTITCH_STORE": "s3://bucket/team"})
        shell("init", world.line(tmp_path / "line.yaml", gates=None, retention=None))
        for name in ("colour", "number"):
            shell.add(world, name)
        assert shell.state().champion == 2
        listed = bucket.list_objects_v2(Bucket="bucket", Prefix="team/models/")["Contents"]
        keys = {each["Key"].removeprefix("team/models/demo/") for each in listed}
        assert {"1/MLmodel", "2/MLmodel", "2/model/model.safetensors"} <= keys
        assert not [key for key in keys if key.startswith("1/model/")]
        champion = client_of(shell).get_model_version_by_alias("demo", "champion")
        assert champion.source == "s3://bucket/team/models/demo/2"
        copies = [*shell.home.glob("mlartifacts/**/*.safetensors")]
        assert not copies, "there is no second copy"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shell.home / 'mlflow.db'}")
        monkeypatch.setenv("RESTITCH_HOME", str(tmp_path / "elsewhere"))
        pipeline = mlflow.transformers.load_model("models:/demo@champion")
        assert type(pipeline.model).__name__ == "BertModel"
        model = mlflow.pyfunc.load_model("models:/demo/1")
        found = model.predict(pd.DataFrame({"text": ["one"]}), params={"task": "colour"})
        assert found["label"][0] in ("red", "green", "blue")
        checked = shell.json("verify", "--deep")["store"]
        assert (checked["notes"], checked["mlflow_weights"]) == ([], 1)
        bucket.put_object(Bucket="bucket", Key="team/models/demo/2/model/config.json", Body=b"{}")
        found = shell("verify", "--deep", code=7).out
        assert "have another configuration" in found
