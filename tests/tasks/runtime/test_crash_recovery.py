"""Each crash restarts its run once; only runs without heartbeat are marked as crashed."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from restitch.tasks.runtime.crash_recovery import (
    MAX_CRASHES,
    SILENT_AFTER,
    STUCK_AFTER,
    mark_silent_runs,
    restart,
)
from tests.fake_prefect import FakePrefect, fake_prefect

START = {flow: f"POST /deployments/the-{flow}/create_flow_run" for flow in ("onboard", "remerge")}
MODEL = {"line": "demo", "task": "colour", "version": 1, "mlflow_version": None}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakePrefect]:
    monkeypatch.setenv("RESTITCH_HOME", str(tmp_path / "home"))
    with fake_prefect() as found:
        monkeypatch.setenv("PREFECT_API_URL", found.url)
        found.knows_deployments()
        yield found


def test_each_crash_restarts_its_run_once_with_the_same_parameters(server: FakePrefect) -> None:
    for run in ("first", "first", "second"):
        assert restart("onboard", run, MODEL)
    bodies = server.bodies(START["onboard"])
    assert [body["parameters"] for body in bodies] == [MODEL] * 3
    keys = [body["idempotency_key"] for body in bodies]
    assert keys[0] == keys[1] != keys[2]


def test_a_remerge_that_crashes_too_often_is_left_to_the_schedule(server: FakePrefect) -> None:
    parameters: dict[str, Any] = {"line": "demo", "force": True}
    started = 0
    while restart("remerge", f"run {started}", parameters):
        parameters = server.bodies(START["remerge"])[-1]["parameters"]
        started += 1
        assert parameters == {"line": "demo", "force": True, "attempt": started}
    assert started == MAX_CRASHES - 1


def run_of(state: str, age: timedelta, line: str = "demo") -> dict[str, Any]:
    since = datetime.now(UTC) - age
    return {
        "id": f"{state}-{line}",
        "name": "a-run",
        "state_type": state,
        "state": {"timestamp": since.isoformat()},
        "parameters": {"line": line},
    }


SECOND = timedelta(seconds=1)


@pytest.mark.parametrize(
    ("state", "age", "heard", "marked"),
    [
        ("RUNNING", SILENT_AFTER + SECOND, False, True),
        ("RUNNING", SILENT_AFTER + SECOND, True, False),
        ("RUNNING", SILENT_AFTER - SECOND, False, False),
        ("PENDING", STUCK_AFTER + SECOND, False, True),
        ("PENDING", STUCK_AFTER - SECOND, False, False),
    ],
)
def test_only_a_run_without_heartbeat_for_long_is_marked(
    server: FakePrefect, state: str, age: timedelta, heard: bool, marked: bool
) -> None:
    runs = [run_of(state, age), run_of(state, age, line="another")]
    server.answers["POST /flow_runs/filter"] = (200, runs)
    server.answers["POST /events/filter"] = (200, {"events": [{}] if heard else []})
    request = f"POST /flow_runs/{state}-demo/set_state"
    server.answers[request] = (201, {})
    mark_silent_runs("demo")
    bodies = server.bodies(request)
    # One for each of the three flows.
    assert len(bodies) == (3 if marked else 0)
    assert all(body["state"]["type"] == "CRASHED" and not body["force"] for body in bodies)
    assert not server.bodies(f"POST /flow_runs/{state}-another/set_state")
