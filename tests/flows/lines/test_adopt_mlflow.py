"""Models that were registered in MLflow only: adopted once, described, shown and merged."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from restitch.flows.lines.adopt_mlflow import Adopted, adopt, adopt_one
from restitch.flows.lines.declare_task import declare_task
from restitch.merging.errors import BadInput, Unavailable
from restitch.registry.home import Home
from restitch.registry.ledger.finetuned_models import NO_GAIN, UNREAD
from restitch.registry.mlflow.connection import connect
from restitch.registry.mlflow.projection import ACCEPT_TAG, DIGEST_TAG, VERSION_TAG
from restitch.registry.mlflow.sync import MlflowProjection
from tests.servers import free_port, mlflow_server, s3_server
from tests.shell import Shell
from tests.worlds import World, turned

if TYPE_CHECKING:
    from mlflow import MlflowClient


@pytest.fixture
def line(world: World, shell: Shell, tmp_path: Path) -> Iterator[Shell]:
    """A line without tasks, in the environment of its home."""
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    with shell.inside():
        yield shell


@pytest.fixture
def client(line: Shell) -> "MlflowClient":
    return connect(Home(line.home))


def made(
    client: "MlflowClient", source: object, task: str = "colour", **options: Any
) -> tuple[str, str]:
    """A version as a training job makes it: (name, number)."""
    name = f"demo.{task}"
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    version = client.create_model_version(name, source=str(source), await_creation_for=0, **options)
    return name, str(version.version)


def states(found: tuple[Adopted, ...]) -> list[tuple[str, int, str]]:
    return [(a.task, a.version, a.state) for a in found]


def tags(client: "MlflowClient", version: tuple[str, str]) -> dict[str, str]:
    return dict(client.get_model_version(*version).tags)


def test_a_version_that_only_mlflow_has_reaches_the_champion(
    line: Shell, world: World, client: "MlflowClient"
) -> None:
    line("task", "demo", "--task", world.task("colour"))
    version = made(client, world.model("colour"))
    assert states(adopt("demo")) == [("colour", 1, "registered")]
    assert tags(client, version)["restitch.state"] == "registered"
    line("remerge", "demo")
    line_state = line.state()
    model = line_state.tasks["colour"].versions[1]
    assert (line_state.champion, model.state) == (1, "ready")
    assert model.model.uri == "models:/demo.colour/1"
    assert model.mlflow is not None
    assert model.mlflow.number == int(version[1])
    assert line.kinds() == [
        *("configured", "configured", "registered", "localized", "merged", "promoted")
    ]
    found = tags(client, version)
    assert (found["restitch.state"], found[VERSION_TAG]) == ("ready", "1")
    assert found[DIGEST_TAG] == model.model.weights
    assert len(client.search_model_versions("name = 'demo.colour'")) == 1


def test_an_adopted_model_equals_a_registered_one(
    line: Shell, world: World, client: "MlflowClient", new_home: Any, tmp_path: Path
) -> None:
    line("task", "demo", "--task", world.task("colour"))
    made(client, world.model("colour"))
    adopt("demo")
    line("remerge", "demo")
    other = new_home("other")
    other("init", world.line(tmp_path / "line.yaml", retention=None))
    other.add(world, "colour")
    assert line.patch_bytes() == other.patch_bytes()


def test_adopting_twice_does_nothing(line: Shell, world: World, client: "MlflowClient") -> None:
    line("task", "demo", "--task", world.task("colour"))
    made(client, world.model("colour"))
    made(client, world.model("number"), task="number")
    made(client, world.root / "nothing", task="animal")
    assert len(adopt("demo")) == 3
    before = line.head_bytes()
    assert adopt("demo") == ()
    assert adopt("demo") == ()
    assert line.head_bytes() == before


@pytest.mark.parametrize("form", ["path", "uri", "yaml", "without its name"])
def test_a_tag_describes_the_task(
    line: Shell, world: World, client: "MlflowClient", form: str
) -> None:
    file = world.task("colour")
    text = file.read_text()
    tag = {
        "path": str(file),
        "uri": file.as_uri(),
        "yaml": text,
        "without its name": "".join(
            one for one in text.splitlines(keepends=True) if not one.startswith("task:")
        ),
    }[form]
    made(client, world.model("colour"), tags={"restitch.task": tag})
    assert states(adopt("demo")) == [("colour", 1, "registered")]
    spec = line.state().tasks["colour"].spec
    assert spec.data is not None
    assert spec.data.content is not None
    assert declare_task("demo", file).action == "unchanged"


def test_without_a_description_a_model_waits_until_there_is_one(
    line: Shell, world: World, client: "MlflowClient"
) -> None:
    version = made(client, world.model("colour"))
    (waiting,) = adopt("demo")
    assert waiting.state == "waiting"
    assert "restitch task demo" in (waiting.reason or "")
    assert adopt_one("demo", "colour", int(version[1])) is None
    assert "waiting" in line("status", "demo").out
    assert "has no description" in tags(client, version)["restitch.reason"]
    assert line.json("remerge", "demo")["action"] == "empty"
    assert line.state().members == ()
    declared = line.json("task", "demo", "--task", world.task("colour"))
    assert (declared["action"], declared["waiting"]) == ("declared", [1])
    assert states(adopt("demo")) == [("colour", 1, "registered")]
    assert line.kinds() == ["configured", "waiting", "configured", "registered"]
    assert line.json("remerge", "demo")["action"] == "promoted"
    assert adopt_one("demo", "colour", int(version[1])) == 1


@pytest.mark.parametrize(
    ("tag", "told"),
    [
        ("/nowhere/task.yaml", "cannot be read"),
        ("s3://bucket/task.yaml", "names an address that cannot be read"),
        ("task: number\n", "another task"),
        ("dta: {}\n", "dta"),
        ("data: {path: /nowhere}\nhead: {labels: [a, b]}\n", "/nowhere"),
        ("[1, 2", "not valid YAML"),
    ],
)
def test_a_broken_tag_is_reported_and_can_be_corrected(
    line: Shell, world: World, client: "MlflowClient", tag: str, told: str
) -> None:
    version = made(client, world.model("colour"), tags={"restitch.task": tag})
    (waiting,) = adopt("demo")
    assert (waiting.state, told in (waiting.reason or "")) == ("waiting", True)
    client.set_model_version_tag(*version, "restitch.task", str(world.task("colour")))
    assert states(adopt("demo")) == [("colour", 1, "registered")]


def test_an_unreadable_model_is_quarantined_once_and_does_not_stop_others(
    line: Shell, world: World, client: "MlflowClient", tmp_path: Path
) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"no")
    text = tmp_path / "model.txt"
    text.write_text("no")
    line("task", "demo", "--task", world.task("colour"))
    bad = [
        made(client, source)
        for source in (tmp_path / "gone", pickled, text, "runs:/none/model", "ftp://host/model")
    ]
    made(client, world.model("colour"))
    found = adopt("demo")
    assert [a.state for a in found] == ["quarantined"] * 5 + ["registered"]
    assert all(a.reason for a in found[:5])
    assert "safetensors" in (found[1].reason or "")
    assert line.kinds()[2:] == ["quarantined"] * 5 + ["registered"]
    assert line.state().tasks["colour"].versions[1].model.weights == UNREAD
    for version in bad:
        assert tags(client, version)["restitch.state"] == "quarantined"
        assert tags(client, version)["restitch.reason"]
    assert adopt("demo") == ()


def test_an_unreachable_bucket_differs_from_an_empty_one(
    line: Shell,
    world: World,
    client: "MlflowClient",
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import boto3

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "of-a-test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    line("task", "demo", "--task", world.task("colour"))
    made(client, "s3://bucket/nothing")
    made(client, "s3://bucket/model")
    before = line.head_bytes()
    assert adopt("demo") == ()
    assert line.head_bytes() == before
    with s3_server(tmp_path / "s3") as url:
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", url)
        bucket = boto3.client("s3", endpoint_url=url)
        bucket.create_bucket(Bucket="bucket")
        for file in world.model("colour").iterdir():
            bucket.upload_file(str(file), "bucket", f"model/{file.name}")
        assert states(adopt("demo")) == [
            *(("colour", 1, "quarantined"), ("colour", 2, "registered"))
        ]


def test_the_source_of_a_version_stays_as_it_was(
    line: Shell, world: World, client: "MlflowClient"
) -> None:
    before = {file.name: file.read_bytes() for file in world.model("colour").iterdir()}
    version = made(client, world.model("colour").as_uri())
    adopt("demo")
    assert {file.name: file.read_bytes() for file in world.model("colour").iterdir()} == before
    assert client.get_model_version(*version).source == world.model("colour").as_uri()


def test_a_kill_before_mlflow_is_written_duplicates_nothing(
    line: Shell, world: World, client: "MlflowClient", monkeypatch: pytest.MonkeyPatch
) -> None:
    line("task", "demo", "--task", world.task("colour"))
    version = made(client, world.model("colour"))
    with monkeypatch.context() as patched:
        patched.setattr(MlflowProjection, "repair", _killed)
        with pytest.raises(KeyboardInterrupt):
            adopt("demo")
    assert line.kinds() == ["configured", "configured", "registered"]
    assert VERSION_TAG not in tags(client, version)
    assert adopt("demo") == ()
    assert tags(client, version)[VERSION_TAG] == "1"
    assert len(client.search_model_versions("name = 'demo.colour'")) == 1
    assert len(line.kinds()) == 3


def _killed(*_: object, **__: object) -> int:
    raise KeyboardInterrupt


def test_a_kill_between_two_tags_duplicates_nothing(
    line: Shell, world: World, client: "MlflowClient", monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    line("task", "demo", "--task", world.task("colour"))
    version = made(client, world.model("colour"))
    real, done = MlflowClient.set_model_version_tag, list[str]()

    def dying(self: Any, name: str, number: str, key: str, value: str) -> None:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(key)
        real(self, name, number, key, value)

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "set_model_version_tag", dying)
        with pytest.raises(KeyboardInterrupt):
            adopt("demo")
    assert len({DIGEST_TAG, VERSION_TAG} & tags(client, version).keys()) == 1
    line("remerge", "demo")
    assert {DIGEST_TAG, VERSION_TAG} <= tags(client, version).keys()
    assert len(client.search_model_versions("name = 'demo.colour'")) == 1


def test_description_and_tags_of_the_author_are_kept(
    line: Shell, world: World, client: "MlflowClient"
) -> None:
    mine = made(client, world.model("colour"), description="trained on Tuesday")
    bare = made(client, world.model("number"), task="number")
    adopt("demo")
    assert client.get_model_version(*mine).description == "trained on Tuesday"
    assert "It waits" in client.get_model_version(*bare).description
    line("task", "demo", "--task", world.task("number"))
    adopt("demo")
    line("remerge", "demo")
    assert client.get_model_version(*mine).description == "trained on Tuesday"
    assert "It is localized" in client.get_model_version(*bare).description


def test_the_same_weights_are_linked_and_not_duplicated(
    line: Shell, world: World, client: "MlflowClient"
) -> None:
    line.add(world, "colour")
    version = made(client, world.model("colour"))
    before = line.head_bytes()
    (linked,) = adopt("demo")
    assert (linked.version, linked.linked, linked.state) == (1, True, "ready")
    assert line.head_bytes() == before
    assert adopt("demo") == ()
    assert adopt_one("demo", "colour", int(version[1])) == 1
    MlflowProjection(Home(line.home)).repair(line.ledger(), full=True)
    assert len(client.search_model_versions("name = 'demo.colour'")) == 2
    assert "same weights" in tags(client, version)["restitch.reason"]


def test_a_waiting_model_is_retired_if_its_weights_were_registered_meanwhile(
    line: Shell, world: World, client: "MlflowClient"
) -> None:
    made(client, world.model("colour"))
    made(client, world.model("colour"))
    assert [a.state for a in adopt("demo")] == ["waiting", "waiting"]
    line("task", "demo", "--task", world.task("colour"))
    assert sorted(a.state for a in adopt("demo")) == ["registered", "retired"]
    assert adopt("demo") == ()


def test_the_author_of_a_version_is_the_actor(
    line: Shell, world: World, client: "MlflowClient"
) -> None:
    line("task", "demo", "--task", world.task("colour"))
    experiment = client.create_experiment("training", str(line.home / "artifacts"))
    run = client.create_run(experiment, tags={"mlflow.user": "ann"}).info.run_id
    client.log_artifacts(run, str(world.model("colour")), "model")
    made(client, f"runs:/{run}/model", run_id=run)
    adopt("demo")
    made(client, world.model("colour-2"))
    adopt("demo")
    assert [(act.kind, act.actor) for act in line.acts()[2:]] == [
        *(("registered", "ann"), ("registered", "mlflow"))
    ]


def test_registered_models_of_other_names_are_left_alone(
    line: Shell, world: World, client: "MlflowClient"
) -> None:
    for name in ("demo", "demox.colour", "demo.Not A Name", "demo.a.b", "other.colour"):
        client.create_registered_model(name)
        client.create_model_version(name, str(world.model("colour")), await_creation_for=0)
    before = line.head_bytes()
    assert adopt("demo") == ()
    assert line.head_bytes() == before


def test_versions_of_a_recreated_registered_model_count_as_new(
    line: Shell, world: World, client: "MlflowClient"
) -> None:
    made(client, world.root / "gone")
    adopt("demo")
    client.delete_registered_model("demo.colour")
    assert made(client, world.root / "gone too")[1] == "1"
    assert states(adopt("demo")) == [("colour", 2, "quarantined")]
    assert adopt("demo") == ()


def test_another_description_in_a_tag_changes_the_task(
    line: Shell, world: World, client: "MlflowClient"
) -> None:
    line("task", "demo", "--task", world.task("colour"))
    made(client, world.model("colour"), tags={"restitch.task": json.dumps({"metric": "f1"})})
    assert states(adopt("demo")) == [("colour", 1, "registered")]
    assert line.state().tasks["colour"].spec.metric == "f1"


def test_an_event_for_a_missing_version_is_refused(line: Shell) -> None:
    for task in ("colour", "no name at all"):
        with pytest.raises(BadInput, match="no version 7"):
            adopt_one("demo", task, 7)


def test_an_event_adopts_only_its_version(
    line: Shell, world: World, client: "MlflowClient"
) -> None:
    line("task", "demo", "--task", world.task("colour"))
    made(client, world.model("colour"))
    second = made(client, world.model("colour-2"))
    assert adopt_one("demo", "colour", int(second[1])) == 1
    assert adopt_one("demo", "colour", int(second[1])) == 1
    assert states(adopt("demo")) == [("colour", 2, "registered")]


def test_with_mlflow_away_it_is_left_for_the_next_call(
    line: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(Unavailable):
        adopt("demo")


def test_a_source_that_is_away_is_left_for_the_next_call(
    line: Shell, world: World, client: "MlflowClient", monkeypatch: pytest.MonkeyPatch
) -> None:
    line("task", "demo", "--task", world.task("colour"))
    made(client, world.model("colour"))

    def away(*_: object) -> Any:
        raise ConnectionError("no answer from https://ann:secret@host")

    before = line.head_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("restitch.flows.lines.adopt_mlflow.describe_model", away)
        assert adopt("demo") == ()
        with pytest.raises(Unavailable) as raised:
            adopt_one("demo", "colour", 1)
    assert "secret" not in str(raised.value)
    assert line.head_bytes() == before
    assert states(adopt("demo")) == [("colour", 1, "registered")]


def test_versions_on_a_server_are_adopted_like_those_in_a_database(
    line: Shell, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    with mlflow_server(tmp_path / "mlflow") as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        client = MlflowClient(url, url)
        experiment = client.create_experiment("training")
        run = client.create_run(experiment, tags={"mlflow.user": "ann"}).info.run_id
        client.log_artifacts(run, str(world.model("colour")), "model")
        logged = client.create_logged_model(experiment, source_run_id=run)
        client.log_model_artifacts(logged.model_id, str(world.model("number")))
        client.finalize_logged_model(logged.model_id, "READY")
        first = made(client, f"runs:/{run}/model", run_id=run)
        made(client, f"models:/{logged.model_id}", task="number", model_id=logged.model_id)
        made(client, f"runs:/{run}/nothing", task="animal", run_id=run)
        for task in ("colour", "number", "animal"):
            line("task", "demo", "--task", world.task(task))
        found = adopt("demo")
        assert states(found) == [
            *(("colour", 1, "registered"), ("number", 1, "registered")),
            ("animal", 1, "quarantined"),
        ]
        assert adopt("demo") == ()
        line("remerge", "demo")
        assert tags(client, first)["restitch.state"] == "ready"
        assert len(client.search_model_versions("name = 'demo.colour'")) == 1
    record = line.ledger().merged(1)
    assert record.members.keys() == {"colour", "number"}
    assert line.acts()[-1].kind == "promoted"
    assert "ann" in {act.actor for act in line.acts()}


NOISE = "the rows are noisy"


@pytest.mark.parametrize("when", ["at first", "later", "with another version"])
def test_a_tag_accepts_a_model_without_a_gain(
    line: Shell, world: World, client: "MlflowClient", tmp_path: Path, when: str
) -> None:
    line("task", "demo", "--task", turned(world, tmp_path))
    tag = {ACCEPT_TAG: NOISE}
    version = made(client, world.model("colour"), tags=tag if when == "at first" else {})
    line.json("remerge", "demo", code=None)
    if when != "at first":
        assert line.state().tasks["colour"].versions[1].state == "held"
        assert tags(client, version)["restitch.gain"] == "worse"
        assert line.json("remerge", "demo")["action"] == "empty"
    if when == "later":
        client.set_model_version_tag(*version, ACCEPT_TAG, NOISE)
    elif when == "with another version":
        made(client, world.model("colour"), tags=tag)
    line("remerge", "demo")
    model = line.state().tasks["colour"].versions[1]
    assert (line.state().champion, model.state) == (1, "ready")
    assert model.facts.accepted[NO_GAIN].reason == NOISE
    assert [act.kind for act in line.acts() if NOISE in act.reason] == ["registered"]
    assert tags(client, version)[ACCEPT_TAG] == NOISE
    line.check_settled()


def test_a_tag_describes_what_the_author_measured(
    line: Shell, world: World, client: "MlflowClient"
) -> None:
    text = world.task("colour").read_text() + "expected: 0.5\n"
    made(client, world.model("colour"), tags={"restitch.task": text})
    adopt("demo")
    done = line("remerge", "demo")
    assert "its author measured accuracy 0.500" in " ".join(done.err.split())
    task = line.state().tasks["colour"]
    assert (task.versions[1].facts.expected, task.spec.expected) == (0.5, None)
