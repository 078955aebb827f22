import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from restitch.merging.errors import BadInput, Damage, Unavailable
from restitch.registry.home import Home
from restitch.registry.sources.hub import is_read, sizes_on_hub
from restitch.registry.sources.resolve import Source, copy_into_store, pin_data, resolve_source
from tests.hub_server import fake_hub
from tests.registry.builders import home_with_mlflow

MODEL = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"{}"}


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with fake_hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield running


def folder(path: Path, content: dict[str, bytes] = MODEL) -> Path:
    path.mkdir(parents=True)
    for name, data in content.items():
        (path / name).write_bytes(data)
    return path


class TestPath:
    def test_an_existing_path_is_used_in_place(self, home, tmp_path):
        made = folder(tmp_path / "model")
        assert resolve_source(made, home) == Source(str(made), made, "path")
        assert resolve_source(f"file://{made}", home).local == made
        file = made / "model.safetensors"
        assert resolve_source(str(file), home).local == file
        assert not home.root.exists()

    def test_an_existing_path_wins_over_a_hub_id(self, home, tmp_path, monkeypatch):
        made = folder(tmp_path / "org" / "model")
        monkeypatch.chdir(tmp_path)
        assert resolve_source("org/model", home).uri == str(made)

    @pytest.mark.parametrize("source", ["./gone", "/gone", "gs://bucket/model", "https://x/y"])
    def test_a_missing_model_is_an_error(self, home, source):
        with pytest.raises(BadInput, match="there is no model at"):
            resolve_source(source, home)


class TestCopy:
    def test_a_copy_is_named_by_its_content_and_read_without_the_original(self, home, tmp_path):
        extra = {"chat_template.jinja": b"{{ x }}", "notes.md": b"", "optimizer.pt": b"pickle"}
        made = folder(tmp_path / "model", MODEL | extra)
        copy = copy_into_store(resolve_source(made, home), home)
        assert (copy.kind, copy.local) == ("copy", made)
        other = folder(tmp_path / "other", MODEL | {"chat_template.jinja": b"{{ x }}"})
        assert copy_into_store(resolve_source(other, home), home).uri == copy.uri
        shutil.rmtree(made)
        elsewhere = Home(tmp_path / "elsewhere", str(home.store_path))
        found = resolve_source(copy.uri, elsewhere)
        assert (found.uri, found.kind) == (copy.uri, "copy")
        assert files(found) == MODEL | {"chat_template.jinja": b"{{ x }}"}
        assert resolve_source(copy.uri, elsewhere) == found

    def test_files_that_two_models_share_are_kept_once(self, home, tmp_path):
        for name in ("one", "two"):
            made = folder(tmp_path / name, MODEL | {"model.safetensors": name.encode()})
            copy_into_store(resolve_source(made, home), home)
        # What their other files hold is the same; each has its weights and its manifest.
        assert len(list(home.open_store().list("blobs"))) == 1 + 2 + 2

    def test_a_single_file_of_any_name_is_a_model(self, home, tmp_path):
        file = tmp_path / "step-100.safetensors"
        file.write_bytes(b"weights")
        copy = copy_into_store(resolve_source(file, home), home)
        assert files(resolve_source(copy.uri, home)) == {"model.safetensors": b"weights"}

    def test_a_folder_without_a_model_is_not_copied(self, home, tmp_path):
        pickled = folder(tmp_path / "pickled", {"pytorch_model.bin": b"x"})
        for source in (pickled, pickled / "pytorch_model.bin"):
            with pytest.raises(BadInput, match=r"pytorch_model\.bin"):
                copy_into_store(resolve_source(source, home), home)
        assert not home.store_path.exists()

    def test_an_address_without_a_copy_is_an_error(self, home):
        for uri in ("store://", "store://../../etc", "store://" + "A" * 64):
            with pytest.raises(BadInput, match="is not the address of a copy"):
                resolve_source(uri, home)
        with pytest.raises(Damage, match="missing"):
            resolve_source("store://" + "0" * 64, home)


def files(found: Source) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(found.local.iterdir())}


class TestHub:
    def test_an_id_is_pinned_and_a_moved_branch_changes_nothing(
        self, hub, home, tmp_path, monkeypatch
    ):
        first = hub.commit("org/model", MODEL)
        found = resolve_source("org/model", home)
        assert (found.uri, found.revision) == (f"org/model@{first}", first)
        assert files(found) == MODEL
        second = hub.commit("org/model", MODEL | {"model.safetensors": b"other"})
        assert resolve_source(found.uri, home) == found
        moved = resolve_source("org/model", home)
        assert moved.uri == f"org/model@{second}"
        assert files(moved)["model.safetensors"] == b"other"
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "elsewhere"))
        assert files(resolve_source(found.uri, home)) == MODEL

    def test_a_pinned_id_in_the_cache_needs_no_hub(self, hub, home):
        sha = hub.commit("org/model", MODEL)
        found = resolve_source(f"org/model@{sha}", home)
        hub.requests.clear()
        assert resolve_source(f"org/model@{sha}", home) == found
        assert hub.requests == []
        hub.stop()
        assert resolve_source(f"org/model@{sha}", home) == found

    def test_sizes_are_those_that_the_hub_lists(self, hub, home, monkeypatch):
        hub.commit("org/model", MODEL | {"onnx/model.onnx": b"large"})
        hub.commit("org/rows", {"data/test.jsonl": b"{}"}, kind="datasets")
        sizes = sizes_on_hub("org/model", "model")
        assert sizes == {name: len(data) for name, data in MODEL.items()} | {"onnx/model.onnx": 5}
        assert not is_read("onnx/model.onnx")
        assert all(map(is_read, MODEL))
        assert sizes_on_hub("org/rows", "dataset") == {"data/test.jsonl": 2}
        with pytest.raises(BadInput, match="org/gone"):
            sizes_on_hub("org/gone", "dataset")
        pinned = resolve_source("org/model", home).uri
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert sizes_on_hub(pinned, "model") == {}
        with pytest.raises(Unavailable):
            sizes_on_hub("org/rows", "dataset")

    def test_a_branch_and_a_tag_are_pinned_too(self, hub, home):
        sha = hub.commit("org/model", MODEL, branch="v1")
        assert resolve_source("org/model@v1", home).uri == f"org/model@{sha}"

    def test_only_files_that_are_read_are_fetched(self, hub, home):
        extra = {
            "pytorch_model.bin": b"pickle",
            "model.fp16.safetensors": b"variant",
            "onnx/model.safetensors": b"deep",
            "modeling_custom.py": b"code",
            "README.md": b"",
            "spiece.model": b"",
            "vocab.txt": b"",
            "model.safetensors.index.json": b"{}",
        }
        hub.commit("org/model", MODEL | extra)
        assert sorted(files(resolve_source("org/model", home))) == [
            "README.md",
            "config.json",
            "model.safetensors",
            "model.safetensors.index.json",
            "spiece.model",
            "tokenizer.json",
            "vocab.txt",
        ]

    def test_a_repository_of_pickles_is_refused_with_a_hint(self, hub, home):
        hub.commit("org/model", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
        with pytest.raises(BadInput, match="no safetensors") as raised:
            resolve_source("org/model", home)
        assert "save_pretrained" in str(raised.value)
        assert not any("bin" in asked for asked in hub.requests)

    def test_a_model_that_is_not_on_the_hub_is_bad_input(self, hub, home):
        hub.commit("org/model", MODEL)
        with pytest.raises(BadInput, match="neither a local path nor on the hub"):
            resolve_source("org/gone", home)
        for revision in ("nowhere", "0" * 40):
            with pytest.raises(BadInput, match=f"has no revision {revision}"):
                resolve_source(f"org/model@{revision}", home)

    def test_a_file_that_is_missing_from_its_commit_is_an_error(self, hub, home):
        hub.commit("org/model", MODEL)
        hub.removed.add("model.safetensors")
        with pytest.raises(BadInput, match="cannot be read"):
            resolve_source("org/model", home)
        hub.removed.clear()
        assert files(resolve_source("org/model", home)) == MODEL

    def test_a_broken_or_unreachable_hub_is_unavailable(self, hub, home, monkeypatch):
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _seconds: None)
        sha = hub.commit("org/model", MODEL)
        hub.broken = True
        with pytest.raises(Unavailable):
            resolve_source("org/model", home)
        hub.stop()
        for source in ("org/model", f"org/model@{sha}"):
            with pytest.raises(Unavailable, match="HF_ENDPOINT"):
                resolve_source(source, home)
        # A mistyped folder has the form of a hub id.
        with pytest.raises(Unavailable, match="models/bse is not a local path"):
            resolve_source("models/bse", home)

    def test_data_is_pinned_with_its_configuration(self, hub):
        sha = hub.commit("org/data", {"train.csv": b"a\n1\n"}, kind="datasets")
        assert pin_data("org/data") == f"org/data@{sha}"
        assert pin_data("org/data:small") == f"org/data:small@{sha}"
        with pytest.raises(BadInput):
            pin_data("org/gone")
        hub.stop()
        assert pin_data(f"org/data@{sha}") == f"org/data@{sha}"

    def test_data_on_disk_stays_where_it_is(self, tmp_path):
        assert pin_data(str(tmp_path)) == str(tmp_path)

    def test_the_environment_alone_decides_and_offline_the_cache_answers(self, hub, tmp_path):
        code = """
from pathlib import Path
from restitch.merging.errors import Unavailable
from restitch.registry.home import Home
from restitch.registry.sources.resolve import resolve_source
try:
    print(resolve_source("org/model", Home(Path("home").absolute())).uri)
except Unavailable as error:
    print("unavailable", error)
"""

        def found(**variables: str) -> str:
            done = hub.run_python(code, tmp_path, **variables)
            assert done.returncode == 0, done.stderr
            return str(done.stdout.strip())

        sha = hub.commit("org/model", MODEL)
        assert found(HF_HUB_OFFLINE="1").startswith("unavailable")
        assert found() == f"org/model@{sha}"
        fill = "from huggingface_hub import snapshot_download; snapshot_download('org/model')"
        assert hub.run_python(fill, tmp_path).returncode == 0
        hub.requests.clear()
        assert found(HF_HUB_OFFLINE="1") == f"org/model@{sha}"
        assert hub.requests == []


@pytest.fixture(scope="module")
def mlflow_home(tmp_path_factory, empty_mlflow):
    """A home whose MLflow holds a run with a model, and a registered version of it."""
    return home_with_mlflow(tmp_path_factory.mktemp("mlflow") / "home", empty_mlflow)


@pytest.fixture(scope="module")
def run(mlflow_home, tmp_path_factory):
    from restitch.registry.mlflow.connection import connect

    client = connect(mlflow_home)
    location = mlflow_home.mlartifacts.as_uri()
    made = client.create_run(client.create_experiment("training", artifact_location=location))
    source = tmp_path_factory.mktemp("source")
    client.log_artifacts(made.info.run_id, str(folder(source / "model")), "model")
    pickled = folder(source / "pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    client.log_artifacts(made.info.run_id, str(pickled), "pickled")
    nested = {"MLmodel": b"flavors: {}"}
    client.log_artifacts(made.info.run_id, str(folder(source / "nested", nested)), "nested")
    client.log_artifacts(made.info.run_id, str(folder(source / "weights")), "nested/model")
    target = folder(source / "target", MODEL | {"model.safetensors": b"target"})
    placeholder = {"object.json": json.dumps({"uri": str(target)}).encode()}
    client.log_artifacts(
        made.info.run_id, str(folder(source / "restitch", placeholder)), "restitch"
    )
    client.create_registered_model("trained")
    run_id = str(made.info.run_id)
    client.create_model_version("trained", f"runs:/{run_id}/model", run_id)
    client.set_registered_model_alias("trained", "best", "1")
    return run_id


class TestMlflow:
    def test_a_run_s_artifact_is_read_and_kept(self, mlflow_home, run, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        found = resolve_source(f"runs:/{run}/model", mlflow_home)
        assert found.kind == "mlflow"
        assert found.uri == f"runs:/{run}/model"
        assert {path.name: path.read_bytes() for path in found.local.iterdir()} == MODEL
        assert list(tmp_path.iterdir()) == [], "no database in the user's folder"
        assert list(mlflow_home.scratch.iterdir()) == []

    def test_a_version_and_an_alias_give_the_same_model(self, mlflow_home, run):
        version = resolve_source("models:/trained/1", mlflow_home)
        assert (version.local / "model.safetensors").read_bytes() == b"weights"
        assert resolve_source("models:/trained@best", mlflow_home) == version
        assert version.uri == "models:/trained/1"

    def test_a_fetched_model_needs_no_mlflow(self, mlflow_home, run, tmp_path):
        resolve_source("models:/trained/1", mlflow_home)
        away = Home(tmp_path, str(mlflow_home.store_path), "http://127.0.0.1:9")
        found = resolve_source("models:/trained/1", away)
        assert found.local.is_relative_to(tmp_path)
        assert (found.local / "model.safetensors").read_bytes() == b"weights"

    def test_the_model_may_lie_in_a_subfolder(self, mlflow_home, run):
        found = resolve_source(f"runs:/{run}/nested", mlflow_home)
        assert (found.local / "model.safetensors").read_bytes() == b"weights"

    def test_a_single_file_is_read(self, mlflow_home, run):
        found = resolve_source(f"runs:/{run}/model/model.safetensors", mlflow_home)
        assert [path.name for path in found.local.iterdir()] == ["model.safetensors"]

    def test_a_placeholder_leads_to_the_model(self, mlflow_home, run):
        found = resolve_source(f"runs:/{run}/restitch", mlflow_home)
        assert found.kind == "path"
        assert (found.local / "model.safetensors").read_bytes() == b"target"

    def test_a_pickle_is_refused_with_a_hint(self, mlflow_home, run):
        with pytest.raises(BadInput, match="no safetensors") as raised:
            resolve_source(f"runs:/{run}/pickled", mlflow_home)
        assert "save_pretrained" in str(raised.value)

    @pytest.mark.parametrize(
        "uri",
        ["models:/gone/1", "models:/trained/7", "models:/trained@gone", "models:/trained/latest"],
    )
    def test_a_model_that_is_not_in_mlflow_is_bad_input(self, mlflow_home, run, uri):
        with pytest.raises(BadInput):
            resolve_source(uri, mlflow_home)

    def test_a_copy_that_is_damaged_in_the_store_is_not_unpacked(self, mlflow_home, run, tmp_path):
        resolve_source("models:/trained/1", mlflow_home)
        store = tmp_path / "store"
        shutil.copytree(mlflow_home.store_path, store)
        for blob in (store / "blobs").iterdir():
            if blob.read_bytes() == b"weights":
                blob.write_bytes(b"altered")
        with pytest.raises(Damage):
            resolve_source("models:/trained/1", Home(tmp_path / "other", str(store)))


def test_a_fetch_that_was_killed_is_fetched_again(mlflow_home, run, tmp_path):
    code = f"""
import os
from pathlib import Path
from restitch.registry.home import Home
from restitch.registry.sources import resolve
resolve._put_files = lambda *_: os.kill(os.getpid(), 9)
home = Home(Path({str(tmp_path)!r}), None, {mlflow_home.mlflow_uri!r})
resolve.resolve_source("models:/trained/1", home)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path.cwd(), check=False)
    assert done.returncode == -9
    home = Home(tmp_path, None, mlflow_home.mlflow_uri)
    found = resolve_source("models:/trained/1", home)
    assert (found.local / "model.safetensors").read_bytes() == b"weights"
