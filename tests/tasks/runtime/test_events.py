"""Requests to a Prefect server, and work without one."""

import fcntl
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from restitch.merging.errors import Unavailable
from restitch.tasks.runtime.events import (
    MODEL_REGISTERED,
    MOST_STARTS,
    announce,
    has_workers,
    is_queued,
    run_ended,
    start_run,
)
from restitch.tasks.runtime.merge_lease import merge_lease
from restitch.tasks.runtime.prefect_api import PrefectApi
from restitch.tasks.runtime.workspace import workspace
from tests.fake_prefect import FakePrefect, fake_prefect
from tests.servers import free_port
from tests.shell import Shell

MODEL = {"line": "demo", "task": "colour", "version": 1}
START = "POST /deployments/the-onboard/create_flow_run"


@pytest.fixture
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RESTITCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def server(embedded: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakePrefect]:
    with fake_prefect() as found:
        monkeypatch.setenv("PREFECT_API_URL", found.url)
        yield found


@pytest.fixture
def away(embedded: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a server that is not running, with credentials in it."""
    url = f"http://user:secret@127.0.0.1:{free_port()}/api"
    monkeypatch.setenv("PREFECT_API_URL", url)
    monkeypatch.setattr("restitch.tasks.runtime.prefect_api.PAUSE_SECONDS", 10.0)
    return url


def run_of(
    state: str, parameters: dict[str, Any] | None = None, start: datetime | None = None
) -> dict[str, Any]:
    time = None if start is None else start.isoformat()
    return {"state_type": state, "expected_start_time": time, "parameters": parameters}


def test_without_an_engine_there_are_no_events_and_no_workers(embedded: Path) -> None:
    assert not announce(MODEL_REGISTERED, "demo", "colour", 1)
    assert not has_workers()


def test_a_server_without_our_deployments_has_no_workers(server: FakePrefect) -> None:
    assert not has_workers()
    server.knows_deployments()
    assert has_workers()


def test_emitting_an_event_does_not_import_prefect(server: FakePrefect) -> None:
    server.knows_deployments()
    script = (
        "import sys; from restitch.tasks.runtime.events import announce;"
        "print(announce('e', 'demo', 'colour', 1), 'prefect' in sys.modules)"
    )
    done = Shell(Path(os.environ["RESTITCH_HOME"]), {"PREFECT_API_URL": server.url}).python(script)
    assert done.out.split() == ["True", "False"]


def test_an_event_names_the_line_the_task_and_the_version(server: FakePrefect) -> None:
    server.knows_deployments()
    assert announce(MODEL_REGISTERED, "demo", "colour", 1, mlflow_version=7)
    assert announce(MODEL_REGISTERED, "demo", "colour", 1)
    (first,), (second,) = server.bodies("POST /events")
    assert first["event"] == "restitch.model.registered"
    assert first["payload"] == {**MODEL, "mlflow_version": 7}
    assert first["resource"]["prefect.resource.id"] == "restitch.model.demo.colour"
    assert first["id"] != second["id"]


def test_an_event_that_cannot_be_sent_is_a_warning(
    away: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert not announce(MODEL_REGISTERED, "demo", "colour", 1)
    assert "the scheduled remerge picks it up" in caplog.text
    assert "secret" not in caplog.text


def test_a_key_starts_one_run_and_another_after_that_one_is_over(server: FakePrefect) -> None:
    server.knows_deployments()
    start_run("onboard", MODEL, "key")
    assert server.bodies(START) == [
        {"parameters": MODEL, "idempotency_key": "key", "state": {"type": "SCHEDULED"}}
    ]
    server.requests.clear()
    server.answers[START] = (200, {"id": "old", "state_type": "CRASHED"})
    start_run("onboard", MODEL, "key")
    keys = [body["idempotency_key"] for body in server.bodies(START)]
    assert keys[0] == "key"
    assert len(set(keys)) == len(keys) == MOST_STARTS, "another key each time, up to a limit"


def test_runs_scheduled_for_later_are_not_queued(server: FakePrefect) -> None:
    now = datetime.now(UTC)

    def queued(*runs: dict[str, Any]) -> bool:
        server.answers["POST /flow_runs/filter"] = (200, list(runs))
        return is_queued("onboard", MODEL)

    assert queued(run_of("PENDING", MODEL))
    assert queued(run_of("SCHEDULED", MODEL, now))
    assert not queued(run_of("SCHEDULED", MODEL, now + timedelta(hours=1)))
    assert not queued(run_of("PENDING", {**MODEL, "version": 2}))
    assert not queued()


def test_a_missing_deployment_is_named(server: FakePrefect) -> None:
    server.answers["POST /flow_runs/filter"] = (200, [])
    with pytest.raises(Unavailable, match="no deployment onboard/restitch"):
        start_run("onboard", MODEL, "key")


def test_a_run_that_the_server_does_not_know_is_over(server: FakePrefect) -> None:
    server.answers["GET /flow_runs/one"] = (200, run_of("RUNNING"))
    server.answers["GET /flow_runs/two"] = (200, run_of("CRASHED"))
    assert [run_ended(run) for run in ("one", "two", "three")] == [False, True, True]


def test_an_unreachable_server_is_unavailable_and_its_credentials_stay_hidden(away: str) -> None:
    with pytest.raises(Unavailable) as caught:
        PrefectApi(away, patience=0).deployment("onboard/restitch")
    assert "127.0.0.1" in caught.value.message()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("status", [400, 401, 403, 500])
def test_a_refusal_is_unavailable_with_its_status(server: FakePrefect, status: int) -> None:
    server.answers["POST /events"] = (status, {"detail": "no"})
    with pytest.raises(Unavailable, match=f"status {status} for /events"):
        PrefectApi(server.url).emit([{}])
    assert len(server.requests) == 1, "a retry would not help"


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_requests_to_a_busy_server_are_retried(
    server: FakePrefect, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    server.answers["POST /events"] = (status, None)

    def answered_next(_: float) -> None:
        server.answers["POST /events"] = (204, None)

    monkeypatch.setattr("restitch.tasks.runtime.prefect_api.time.sleep", answered_next)
    PrefectApi(server.url).emit([{"id": "one"}])
    assert server.bodies("POST /events") == [[{"id": "one"}]] * 2


def test_a_busy_server_is_retried_longer_than_an_unreachable_one(
    server: FakePrefect, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("restitch.tasks.runtime.prefect_api.time.monotonic", lambda: now[0])

    def later(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr("restitch.tasks.runtime.prefect_api.time.sleep", later)
    server.answers["POST /events"] = (503, None)
    with pytest.raises(Unavailable, match="status 503"):
        PrefectApi(server.url, patience=1.0).emit([{}])
    assert now[0] == pytest.approx(30.0, abs=1.0)
    now[0] = 0.0
    with pytest.raises(Unavailable):
        PrefectApi(f"http://127.0.0.1:{free_port()}/api", patience=1.0).emit([{}])
    assert now[0] <= 1.0


@pytest.mark.parametrize(
    ("variable", "value", "header"),
    [
        ("PREFECT_API_KEY", "a-key", "Bearer a-key"),
        ("PREFECT_API_AUTH_STRING", "user:word", "Basic dXNlcjp3b3Jk"),
    ],
)
def test_credentials_come_from_prefects_variables(
    server: FakePrefect,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    header: str,
) -> None:
    monkeypatch.setenv(variable, value)
    PrefectApi(server.url).deployment("x/y")
    assert server.requests[0][2]["Authorization"] == header


def test_one_remerge_of_a_line_runs_on_a_host_at_a_time(embedded: Path) -> None:
    with merge_lease(workspace(), "demo") as acquired:
        assert acquired
        lock = (embedded / "locks" / "remerge-demo").open("w")
        with lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with merge_lease(workspace(), "other") as other:
            assert other, "another line does not wait"
    with merge_lease(workspace(), "demo") as acquired:
        assert acquired
