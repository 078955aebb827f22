"""The operation of a stack: `up` again, `up` after crashes, `doctor`, `down`, `up`."""

import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from restitch.deployments.local.health import answers, is_running
from restitch.registry.store.attempts import process_began
from tests.deployments.conftest import Stack

pytestmark = pytest.mark.timeout(600)

NAMES = {"prefect", "mlflow", "webhook", "worker-1", "worker-2"}


def up(stack: Stack, *options: object) -> dict[str, Any]:
    told: dict[str, Any] = stack.process("up", *options, "--json").json
    return told


def pids(stack: Stack) -> dict[str, int]:
    return {name: process.pid for name, process in stack.file.processes.items()}


def findings(stack: Stack, code: int) -> dict[str, dict[str, str]]:
    """The checks of `doctor` by name; of two with one name, the worse."""
    checks = stack.process("doctor", "--json", code=code).json["checks"]
    return {check["name"]: check for check in sorted(checks, key=lambda c: c["status"] == "failed")}


def test_up_again_changes_nothing(stack: Stack) -> None:
    before = stack.file
    told = up(stack)
    assert (told["started"], told["changes"], told["workers"]) == ([], [], 2)
    assert stack.file == before
    assert all(is_running(process) for process in before.processes.values())


def test_doctor_finds_no_problem_on_a_healthy_stack(stack: Stack) -> None:
    found = findings(stack, code=0)
    assert found.keys() >= NAMES | {"mlflow webhook", "deployment onboard", "deployment remerge"}
    # How much is free on the disk is not the stack's doing.
    assert {check["status"] for name, check in found.items() if name != "disk"} == {"ok"}
    assert {check["remedy"] for name, check in found.items() if name != "disk"} == {""}
    online = found["workers of gpu"]["found"]
    assert "worker-1" in online
    assert "worker-2" in online


def test_doctor_names_killed_processes_and_up_restarts_them(stack: Stack) -> None:
    before = pids(stack)
    mlflow = stack.file.mlflow_uri
    for name in ("mlflow", "worker-1"):
        os.kill(before[name], signal.SIGKILL)
    stack.until("both are gone", lambda: not _alive(stack, "mlflow", "worker-1"))
    found = findings(stack, code=6)
    for name in ("mlflow", "worker-1"):
        assert found[name]["status"] == "failed"
        assert "has ended" in found[name]["found"] or "does not answer" in found[name]["found"]
        assert "restitch up" in found[name]["remedy"]
    assert {found[name]["status"] for name in NAMES - {"mlflow", "worker-1"}} == {"ok"}
    assert up(stack)["started"] == ["mlflow", "worker-1"]
    after = pids(stack)
    changed = {name for name in NAMES if before[name] != after[name]}
    assert changed == {"mlflow", "worker-1"}
    assert stack.file.mlflow_uri == mlflow, "the address stays"
    assert answers(f"{mlflow}/health")


def _alive(stack: Stack, *names: str) -> bool:
    return any(is_running(stack.file.processes[name]) for name in names)


def test_down_stops_only_the_processes_of_up_and_the_state_stays(stack: Stack) -> None:
    stack.line("kept")
    deployment = stack.prefect.deployment("onboard/restitch")
    stack.mlflow.create_experiment("kept by MLflow")
    line_state, addresses = stack.shell.head_bytes("kept"), _addresses(stack)
    began = {name: process_began(pid) for name, pid in pids(stack).items()}
    # Somebody else's process that looks much like ours.
    foreign = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)", "prefect", "worker", "start"],
        env={**stack.environment, "RESTITCH_HOME": str(stack.shell.home)},
        start_new_session=True,
    )
    try:
        stopped = stack.process("down", "--json").json["stopped"]
        assert set(stopped) == began.keys() == NAMES
        assert [process.pid for process in stack.processes()] == [foreign.pid]
        assert foreign.poll() is None
        assert stack.file.prefect_api_url is None, "commands work by themselves now"
    finally:
        foreign.kill()
        foreign.wait()
    assert set(up(stack, "--workers", 2)["started"]) == NAMES
    assert _addresses(stack) == addresses
    assert stack.shell.head_bytes("kept") == line_state
    assert _id(stack.prefect.deployment("onboard/restitch")) == _id(deployment)
    assert stack.mlflow.get_experiment_by_name("kept by MLflow") is not None


def _id(deployment: dict[str, Any] | None) -> str:
    assert deployment is not None
    return str(deployment["id"])


def _addresses(stack: Stack) -> tuple[Any, ...]:
    file = stack.file
    return file.prefect_api_url, file.mlflow_uri, file.webhook_url
