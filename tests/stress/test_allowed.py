"""A worker with a list of allowed folders and hosts reads nothing else."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from restitch.flows.lines.adopt_mlflow import _parsed
from restitch.merging.errors import BadInput, Unavailable
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.safe_open import open_regular
from restitch.modeling.configs import read_config
from restitch.modeling.families.family import get_family
from restitch.modeling.licence import read_licence
from restitch.registry.access_policy import check_address, check_path
from restitch.registry.home import Home
from restitch.registry.mlflow.connection import connect
from restitch.registry.sources.resolve import pin_data, resolve_source
from restitch.registry.specs.files import load_task
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.inputs.task_data import check_access, task_data
from tests.conftest import NewHome
from tests.shell import Shell
from tests.worlds import World, copied

ROOTS, HOSTS = "RESTITCH_ALLOWED_ROOTS", "RESTITCH_ALLOWED_HOSTS"


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `in` (allowed), `in2` and `out`, each with a file."""
    for name in ("in", "in2", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("one\ntwo\n")
    monkeypatch.setenv(ROOTS, f"{tmp_path / 'in'}{os.pathsep}/nowhere/at/all")
    return tmp_path


def test_without_a_list_everything_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ROOTS, "")
    check_path(Path("/etc/passwd"), "it")
    check_address("s3://anybody/x", "it")
    check_address("https://anybody/x", "it")


def test_a_path_is_allowed_by_its_folder_and_not_by_a_prefix_of_its_name(places: Path) -> None:
    check_path(places / "in", "it")
    check_path(places / "in" / "file", "it")
    for outside in ("out/file", "in2", "in2/file", "in/../out", "."):
        with pytest.raises(BadInput, match=ROOTS):
            check_path(places / outside, "it")


def test_links_are_resolved_before_the_check(places: Path) -> None:
    (places / "out" / "back").symlink_to(places / "in")
    check_path(places / "out" / "back" / "file", "it")
    link = places / "in" / "deep"
    link.mkdir()
    (link / "model.safetensors").symlink_to(places / "in" / "file")
    check_path(places / "in", "it")
    (link / "config.json").symlink_to(places / "out" / "file")
    with pytest.raises(BadInput, match="outside of the allowed folders"):
        check_path(places / "in", "it")
    (link / "config.json").unlink()
    (link / "loop").symlink_to("loop")
    check_path(places / "in", "it")  # nothing is read by it
    other = places / "out" / "other"
    other.mkdir()
    (other / "around").symlink_to(places)
    (link / "other").symlink_to(other)
    with pytest.raises(BadInput, match="outside of the allowed folders"):
        check_path(places / "in", "it")


@pytest.mark.parametrize(
    ("address", "allowed"),
    [
        ("https://Hub.example/x", True),
        ("https://hub.example.evil.org/x", False),
        ("https://hub.example@evil.org/x", False),
        ("s3://models/x", True),
        ("s3://user:key@models/x", True),
        ("s3://models.evil/x", False),
        ("gs://models/x", False),
        ("hub.example/x", True),  # a path, which the roots are for
        ("mlflow-artifacts:/1/x", True),  # through the tracking server
        ("https://[", False),
    ],
)
def test_an_address_is_allowed_by_its_host(
    monkeypatch: pytest.MonkeyPatch, address: str, allowed: bool
) -> None:
    monkeypatch.setenv(HOSTS, "hub.example, s3://models")
    if allowed:
        check_address(address, "it")
    else:
        with pytest.raises(BadInput):
            check_address(address, "it")


def test_the_hub_needs_its_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path)
    monkeypatch.setenv(HOSTS, "mirror.example")
    for call in (lambda: resolve_source("org/name", home), lambda: pin_data("org/set")):
        with pytest.raises(BadInput, match=r"huggingface\.co"):
            call()
    pinned = "org/set@" + "0" * 40
    with pytest.raises(BadInput):
        pin_data(pinned)
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example:8443")
    assert pin_data(pinned) == pinned


def test_the_path_of_a_model_is_checked_when_it_is_opened(places: Path, tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    assert resolve_source(places / "in", home).local == places / "in"
    for source in (places / "out", f"file://{places / 'out'}", places / "in" / ".." / "out"):
        with pytest.raises(BadInput, match=ROOTS):
            resolve_source(source, home)


def test_a_task_file_cannot_read_files_of_the_worker(places: Path) -> None:
    (places / "in" / "task.yaml").write_text(f"task: t\nhead: {{labels: {places / 'out/file'}}}\n")
    with pytest.raises(BadInput, match=ROOTS):
        load_task(places / "in" / "task.yaml")
    with pytest.raises(BadInput, match=ROOTS):
        _parsed("t", str(places / "out" / "file"))
    with pytest.raises(BadInput, match=ROOTS):
        _parsed("t", f"task: t\nhead: {{labels: {places / 'out/file'}}}\n")


@pytest.mark.parametrize("split", ["../out/rows.csv", "out.csv", "deep"])
def test_a_split_cannot_leave_the_folder_of_its_data(places: Path, split: str) -> None:
    (places / "out" / "rows.csv").write_text("text,label\nx,a\n")
    (places / "in" / "out.csv").symlink_to(places / "out" / "rows.csv")
    (places / "in" / "deep").mkdir()
    (places / "in" / "deep" / "a.png").symlink_to(places / "out" / "file")
    head = {"labels": ["a", "b"]}
    task = TaskSpec.model_validate(
        {"task": "t", "data": {"path": str(places / "in"), "train": split}, "head": head}
    )
    with pytest.raises(BadInput, match="the data of task t lies outside"):
        check_access(task)


def test_a_version_in_mlflow_cannot_name_a_forbidden_source(
    new_home: NewHome, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(new_home("home").home)
    client = connect(home)
    client.create_registered_model("demo.colour")
    for source in (str(places / "out"), f"file://{places}/in/../out", "s3://anybody/x"):
        version = client.create_model_version("demo.colour", source).version
        monkeypatch.setenv(HOSTS, "s3://models")
        with pytest.raises(BadInput, match=f"{ROOTS}|{HOSTS}"):
            resolve_source(f"models:/demo.colour/{version}", home)
    # MLflow's own artifacts are always allowed.
    place = client.create_experiment("e", artifact_location=str(home.mlartifacts))
    run = client.create_run(place).info.run_id
    save_file({"a": torch.ones(1)}, places / "out" / "model.safetensors")
    client.log_artifact(run, str(places / "out" / "model.safetensors"), "model")
    assert resolve_source(f"runs:/{run}/model", home).kind == "mlflow"


@pytest.mark.usefixtures("without_mlflow")
def test_an_event_cannot_make_a_worker_read_a_forbidden_path(
    world: World, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Registered where everything is allowed; onboarded by a worker with a list.
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    model = copied(world.model("colour"), tmp_path / "model", lambda _: None)
    args = ("register", "demo", "--task", world.task("colour"), "--model", model, "--here")
    monkeypatch.setenv(ROOTS, str(world.root))
    told = shell(*args, code=3).err.replace("\n", "")
    assert ROOTS in told
    assert shell.state().tasks == {}
    monkeypatch.setenv(ROOTS, f"{world.root}{os.pathsep}{model}")
    shell(*args)
    monkeypatch.setenv(ROOTS, str(tmp_path))  # without the folder of the data
    told = shell("register", "demo", "--task", world.task("number"), "--model", model, code=3).err
    assert ROOTS in told.replace("\n", "")
    assert list(shell.state().tasks) == ["colour"]


@pytest.mark.usefixtures("without_mlflow")
def test_a_model_that_this_worker_must_not_read_stays_registered(
    world: World, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    model = copied(world.model("colour"), tmp_path / "model", lambda _: None)
    task = ("--task", world.task("colour"))

    def away(*_: object, **__: object) -> None:
        raise Unavailable("the worker is away")

    with monkeypatch.context() as patched:
        patched.setattr("restitch.flows.onboard.validate", away)
        shell("register", "demo", *task, "--model", model, code=6)
    monkeypatch.setenv(ROOTS, str(world.root))
    told = shell("remerge", "demo", code=None).err.replace("\n", "")
    assert ROOTS in told
    assert shell.state().tasks["colour"].versions[1].state == "registered"
    monkeypatch.setenv(ROOTS, f"{world.root}{os.pathsep}{tmp_path}")
    shell("remerge", "demo")
    assert [member.task for member in shell.state().members] == ["colour"]


def test_a_version_that_this_worker_must_not_read_is_not_registered(
    world: World, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    shell("task", "demo", "--task", world.task("colour"))
    client = connect(Home(shell.home))
    client.create_registered_model("demo.colour")
    client.create_model_version("demo.colour", f"file://{world.model('colour')}")
    monkeypatch.setenv(ROOTS, str(world.base))
    told = shell("remerge", "demo", code=None).err.replace("\n", "")
    assert "is not adopted now" in told
    assert ROOTS in told
    assert shell.state().tasks["colour"].versions == {}
    monkeypatch.delenv(ROOTS)
    shell("remerge", "demo")
    assert [member.task for member in shell.state().members] == ["colour"]


def elsewhere(path: Path, outside: Path) -> None:
    """Replace a file by a link to another one, as an attacker could."""
    outside.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(outside)


def test_a_link_created_between_check_and_read_is_refused(places: Path, world: World) -> None:
    model, out = copied(world.model("colour"), places / "in" / "model"), places / "out"
    check_path(model, "the model")
    assert Checkpoint.open(model).digest()
    assert read_config(model)
    for name, read in {
        "model.safetensors": Checkpoint.open,
        "config.json": read_config,
        "README.md": read_licence,
    }.items():
        file = model / name
        file.touch()
        elsewhere(file, out / name)
        if name == "README.md":
            assert read(model) is None
        else:
            with pytest.raises(BadInput, match="outside of the allowed folders"):
                read(model)
    # A folder of the path is replaced by a link too.
    (places / "in" / "model").rename(places / "out" / "model")
    (places / "in" / "model").symlink_to(places / "out" / "model")
    with pytest.raises(BadInput, match="outside of the allowed folders"):
        Checkpoint.open(model)


@pytest.mark.parametrize("kind", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_rows_behind_a_link_created_after_the_check_are_not_read(places: Path, kind: str) -> None:
    data, file = places / "in" / "data", places / "in" / "data" / kind
    data.mkdir()
    rows = [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}]
    if kind.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        lines = "text,label\none,a\ntwo,b\n" if kind.endswith("csv") else json.dumps(rows)
        file.write_text("\n".join(map(json.dumps, rows)) if kind.endswith("jsonl") else lines)
    spec = TaskSpec.model_validate(
        {"task": "t", "data": {"path": str(data), "test": kind}, "head": {"labels": ["a", "b"]}}
    )
    family = get_family("text-encoder")
    assert len(task_data(spec, family).rows("test")) == 2
    found = task_data(spec, family)
    elsewhere(file, places / "out" / kind)
    with pytest.raises(BadInput, match="the data of task t lies outside"):
        found.rows("test")


def test_folders_without_a_check_are_not_restricted(places: Path) -> None:
    link = places / "out" / "link"
    link.symlink_to(places / "in" / "file")
    with open_regular(link) as file:
        assert file.read()
