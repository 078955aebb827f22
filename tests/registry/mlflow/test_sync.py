import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from restitch.merging.errors import Unavailable
from restitch.registry.home import Home
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.mlflow.sync import MlflowProjection
from restitch.registry.mlflow.writer import Writer
from restitch.registry.redaction import without_credentials
from restitch.registry.store.folder import FolderStore
from restitch.registry.store.objects import ObjectStore
from tests.registry.builders import (
    digest,
    home_with_mlflow,
    ledger,
    line_spec,
    merge,
    model,
    model_ref,
    with_task,
)
from tests.registry.mlflow_view import DyingClient, KilledError, run_of, shown


def counts(mlflow: MlflowProjection) -> dict[str, int]:
    return {name: len(things) for name, things in shown(mlflow).items()}


WHOLE = {
    "line": 2,
    "line.audit": 9,
    "line.models": 2,
    "line.history": 2,
    "model line": 2,
    "model line.a": 1,
    "model line.b": 1,
    "aliases": 1,
    "descriptions": 7,
}


def test_a_line_is_projected_completely(mlflow, line):
    assert mlflow.repair(line) == 9
    assert counts(mlflow) == WHOLE
    client = mlflow.client
    champion = client.get_model_version_by_alias("line", "champion")
    assert champion.tags["restitch.version"] == "2"
    run = client.get_run(champion.run_id)
    assert run.data.metrics["retention/ratio"] == 0.9
    assert run.data.metrics["mean/accuracy"] == 0.6
    assert [m.step for m in client.get_metric_history(run.info.run_id, "mean/accuracy")] == [2]
    assert champion.source == f"runs:/{champion.run_id}/restitch"
    artifacts = {file.path for file in client.list_artifacts(champion.run_id)}
    assert artifacts == {"recipe.json", "record.json", "report.html", "restitch"}
    assert "Version 2 of line line" in champion.description
    (joined,) = client.search_model_versions("name = 'line.a'")
    assert joined.tags["restitch.state"] == "ready"
    (refused,) = client.search_model_versions("name = 'line.b'")
    assert (refused.tags["restitch.state"], refused.tags["restitch.reason"]) == (
        "quarantined",
        "NaN",
    )
    assert run_of(mlflow, 2).info.run_id == champion.run_id


def test_an_mlflow_search_finds_what_the_command_line_shows(mlflow, line):
    mlflow.repair(line)
    client = mlflow.client
    audit = client.get_experiment_by_name("line.audit").experiment_id
    (run,) = client.search_runs(
        [audit], "params.kind = 'promoted' and params.`champion.after` = '2'"
    )
    assert run.data.params["champion.before"] == "1"
    (run,) = client.search_runs([audit], f"tags.`restitch.digest` = '{line.state().entry}'")
    assert run.data.params["sequence"] == "9"
    found = client.search_model_versions(
        f"name = 'line.a' and tags.`restitch.digest` = '{digest('a')}'"
    )
    assert len(found) == 1


def test_a_second_repair_processes_nothing_and_is_fast(mlflow, line):
    mlflow.repair(line)
    before = shown(mlflow)
    began = time.process_time()
    assert mlflow.repair(line) == 0
    assert time.process_time() - began < 0.5
    assert MlflowProjection(mlflow.home).repair(line) == 0
    assert shown(mlflow) == before


def test_a_full_repair_of_a_complete_projection_changes_nothing(mlflow, line):
    mlflow.repair(line)
    before = shown(mlflow)
    assert mlflow.repair(line, full=True) == 9
    assert shown(mlflow) == before


def test_only_new_acts_are_processed(mlflow, line):
    mlflow.repair(line)
    line.act(
        "retired", "ann", "old", lambda line_state: line_state.with_state("a", 1, "retired", "old")
    )
    assert mlflow.repair(line) == 1
    (version,) = mlflow.client.search_model_versions("name = 'line.a'")
    assert version.tags["restitch.state"] == "retired"
    assert "retired" in version.description


def test_a_repair_that_is_killed_at_every_write_is_completed(home, tmp_path, empty_mlflow):
    line = ledger(home.store_path)
    line.act("registered", "ann", "", lambda line_state: with_task(line_state, "a", model("a")))
    rows = {"path": "/data/a", "split": "test", "digest": digest("rows")}
    merge(line, tasks=("a",), results={"a": {"merged": 0.5, "data": rows}})
    merge(line, tasks=("a",))
    line.act("rolled-back", "ann", "worse", lambda line_state: line_state.promoted(1))
    reference = MlflowProjection(home_with_mlflow(tmp_path / "reference", empty_mlflow))
    reference.repair(line)
    mlflow = MlflowProjection(home)
    chance = random.Random(0)
    killed = 0
    while True:
        dying = MlflowProjection(home)
        vars(dying)["client"] = DyingClient(mlflow.client, chance.randint(1, 9))
        try:
            dying.repair(line, extras=lambda version: {"report.html": b"of %d" % version})
            break
        except KilledError:
            killed += 1
            assert killed < 200
    assert killed > 10
    assert shown(mlflow) == shown(reference)
    for version in (1, 2):
        run = run_of(mlflow, version).info.run_id
        page = mlflow.client.download_artifacts(run, "report.html", str(tmp_path))
        assert Path(page).read_bytes() == b"of %d" % version
    assert mlflow.repair(line) == 0


def test_two_workers_at_once_create_no_duplicates(home, line):
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: MlflowProjection(home).repair(line), range(2)))
    assert counts(MlflowProjection(home)) == WHOLE


def test_duplicates_of_other_hosts_are_removed(home, mlflow, monkeypatch):
    line = ledger(home.store_path)
    merge(line)
    # Another host holds another lock, and its search came before our creation.
    monkeypatch.setattr(Writer, "runs", lambda *_, **__: [])
    monkeypatch.setattr(Writer, "versions", lambda *_: [])
    mlflow.repair(line)
    mlflow.repair(line, full=True)
    found = counts(mlflow)
    assert (found["line"], found["line.audit"], found["model line"]) == (2, 6, 2)
    monkeypatch.undo()
    mlflow.repair(line, full=True)
    found = counts(mlflow)
    assert (found["line"], found["line.audit"], found["model line"]) == (1, 3, 1)
    assert found["aliases"] == 1


def test_aliases_follow_the_state_of_the_line(mlflow, line):
    mlflow.repair(line)
    line.act("rolled-back", "ann", "worse", lambda line_state: line_state.promoted(1))
    mlflow.repair(line)
    assert shown(mlflow)["aliases"] == {"champion": "1"}
    line.act("merged", "t", "", lambda line_state: line_state.with_merged(line.state().versions[2]))
    version = mlflow.client.search_model_versions("name = 'line'")[0].version
    mlflow.client.set_registered_model_alias("line", "champion", str(version))
    mlflow.client.set_registered_model_alias("line", "mine", str(version))
    mlflow.repair(line)
    assert shown(mlflow)["aliases"]["champion"] == "1"
    assert shown(mlflow)["aliases"]["mine"], "an alias of a user stays"


def test_a_candidate_has_its_alias_while_it_is_one(mlflow, line):
    record = line.merged(2).model_copy(update={"version": 3})
    blob = line.objects.put_blob(record.to_bytes())
    line.act("merged", "t", "", lambda line_state: line_state.with_merged(blob))
    mlflow.repair(line)
    assert shown(mlflow)["aliases"] == {"champion": "2", "candidate": "3"}
    line.act(
        "rejected",
        "t",
        "gate",
        lambda line_state: line_state.model_copy(update={"candidate": None}),
    )
    mlflow.repair(line)
    assert shown(mlflow)["aliases"] == {"champion": "2"}


def test_a_deleted_model_and_a_deleted_database_are_restored(mlflow, line, empty_mlflow):
    mlflow.repair(line)
    before = shown(mlflow)
    mlflow.client.delete_registered_model("line")
    MlflowProjection(mlflow.home).repair(line)
    assert shown(mlflow) == before
    experiment = mlflow.client.get_experiment_by_name("line.audit")
    mlflow.client.delete_experiment(experiment.experiment_id)
    MlflowProjection(mlflow.home).repair(line, full=True)
    assert shown(mlflow) == before


def test_two_lines_do_not_disturb_each_other(mlflow, line):
    other = Ledger(line.objects, "other")
    other.create(line_spec("other"), model_ref("base"), "t", "")
    merge(other)
    mlflow.repair(line)
    mlflow.repair(other)
    assert counts(mlflow) == WHOLE
    assert len(shown(mlflow, "other")["other"]) == 1


def test_an_unreachable_mlflow_is_unavailable_and_its_password_stays_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    store = tmp_path / "store"
    line = ledger(store)
    home = Home(tmp_path / "home", str(store), "http://ann:secret@127.0.0.1:9")
    with pytest.raises(Unavailable) as raised:
        MlflowProjection(home).repair(line)
    assert "secret" not in str(raised.value)
    assert "secret" not in repr(raised.value.__cause__)
    assert raised.value.__suppress_context__
    assert "next remerge updates MLflow" in str(raised.value)
    assert without_credentials("at postgresql://u:p@host/db and s3://k:s@b") == (
        "at postgresql://***@host/db and s3://***@b"
    )


def test_a_file_that_is_not_a_database_is_unavailable(tmp_path):
    line = ledger(tmp_path / "home" / "store")
    (tmp_path / "home" / "mlflow.db").write_bytes(b"not a database" * 100)
    with pytest.raises(Unavailable, match="cannot be used"):
        MlflowProjection(Home(tmp_path / "home")).repair(line)


def test_another_mlflow_is_filled_from_the_store_alone(line, mlflow, tmp_path, empty_mlflow):
    mlflow.repair(line)
    elsewhere = MlflowProjection(home_with_mlflow(tmp_path / "elsewhere", empty_mlflow))
    copy = Ledger(ObjectStore(FolderStore(line.objects.store.root)), "line")
    elsewhere.repair(copy)
    assert shown(elsewhere) == shown(mlflow)


@pytest.mark.slow
def test_a_server_gets_the_same_projection_as_a_database(line, mlflow, tmp_path):
    mlflow.repair(line)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
    database = ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
    artifacts = ["--artifacts-destination", str(tmp_path / "artifacts")]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = subprocess.Popen(
        [*command, *database, *artifacts], cwd=tmp_path, env=environment, start_new_session=True
    )
    try:
        deadline = time.time() + 120
        while time.time() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        home = Home(tmp_path / "client", str(mlflow.home.store_path), f"http://127.0.0.1:{port}")
        remote = MlflowProjection(home)
        remote.repair(line)
        assert remote.repair(line, full=True) == 9
        assert shown(remote) == shown(mlflow)
        champion = remote.client.get_model_version_by_alias("line", "champion")
        found = resolve_object(home, f"runs:/{champion.run_id}/restitch/object.json")
        assert found["digest"] == line.merged(2).patch
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def resolve_object(home: Home, uri: str) -> dict[str, Any]:
    from mlflow.artifacts import download_artifacts

    path = download_artifacts(
        artifact_uri=uri, dst_path=str(home.scratch), tracking_uri=home.mlflow_uri
    )
    return dict(json.loads(Path(path).read_bytes()))
