"""The operation of a stack: `up` again, `up` after crashes, `doctor`, `down`, `up`."""

import os
import signal
import subprocess
import sys
from typing import Any

import httpx
import pytest

from restitch.deployments.local.health import answers, is_running
from restitch.registry.store.attempts import process_began
from tests.deployments.conftest import Stack

pytestmark = [pytest.mark.servers, pytest.mark.timeout(600)]

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


def switch(stack: Stack, line: str, active: bool) -> None:
    """Switch a schedule as Prefect's page does: one request, which is not sent again."""
    schedule, page = _schedule(stack, line)
    body = {key: schedule[key] for key in ("slug", "schedule", "parameters")}
    answer = httpx.patch(f"{page}/{schedule['id']}", json={**body, "active": active}, timeout=60)
    assert answer.status_code == 204


def _schedule(stack: Stack, line: str) -> tuple[dict[str, Any], str]:
    found, page = _schedules(stack, line)
    assert len(found) == 1
    return found[0], page


def _schedules(stack: Stack, line: str) -> tuple[list[dict[str, Any]], str]:
    """The schedules of a line on the server, and their address."""
    deployment = stack.prefect.deployment("remerge/restitch")
    page = f"{stack.prefect.url}/deployments/{_id(deployment)}/schedules"
    return [s for s in httpx.get(page).json() if s["parameters"] == {"line": line}], page


def is_on(stack: Stack, line: str) -> bool:
    return bool(_schedule(stack, line)[0]["active"])


@pytest.mark.slow
def test_a_paused_line_is_left_alone_by_up_deploy_and_doctor(stack: Stack) -> None:
    stack.line("resting")
    up(stack)
    stack.process("pause", "resting", "--reason", "the host is repaired")
    assert not is_on(stack, "resting")
    assert up(stack)["changes"] == []
    told = stack.process("deploy", "--json").json
    assert told["changes"] == []
    assert told["schedules"]["resting"]["state"] == "paused"
    assert not is_on(stack, "resting")
    check = findings(stack, code=0)["schedule of resting"]
    assert check["status"] == "paused"
    assert "the host is repaired" in check["found"]
    stack.register("resting", "colour")
    assert stack.finished(stack.remerge("resting", "while it rests"))["state_type"] == "COMPLETED"
    assert stack.shell.kinds("resting") == ["configured", "paused", "registered"]
    stack.process("resume", "resting")
    assert is_on(stack, "resting")
    assert stack.champion("resting", "colour") == {"colour"}
    assert findings(stack, code=0)["schedule of resting"]["status"] == "ok"


@pytest.mark.slow
def test_a_schedule_that_a_person_paused_in_prefect_stays_paused(stack: Stack) -> None:
    stack.line("switched")
    up(stack)
    switch(stack, "switched", active=False)
    assert up(stack)["changes"] == []
    file = stack.world.line(
        stack.shell.home.parent / "switched.yaml", line="switched", schedule="0 0 2 1 *"
    )
    assert "paused in Prefect" in stack.process("init", file).err
    schedule, _ = _schedule(stack, "switched")
    assert (schedule["active"], schedule["schedule"]["cron"]) == (False, "0 0 2 1 *")
    # A deployment that is made again keeps it, too.
    told = stack.process("deploy", "--remerge-pool", "other", "--json").json
    assert told["schedules"]["switched"]["text"] == "paused in Prefect"
    assert not is_on(stack, "switched")
    stack.process("deploy")
    check = findings(stack, code=0)["schedule of switched"]
    assert (check["status"], check["found"]) == ("paused", "paused in Prefect")
    switch(stack, "switched", active=True)
    assert findings(stack, code=0)["schedule of switched"]["status"] == "ok"


@pytest.mark.slow
def test_a_schedule_that_prefects_command_switched_still_remerges_its_line(stack: Stack) -> None:
    stack.line("commanded")
    up(stack)
    schedule, page = _schedule(stack, "commanded")
    soon = {"cron": "* * * * *", "timezone": "UTC"}
    # As `prefect deployment schedule resume` sends it, which makes Prefect drop the parameters.
    body = {"active": True, "schedule": soon}
    assert httpx.patch(f"{page}/{schedule['id']}", json=body, timeout=60).status_code == 204
    stack.register("commanded", "colour", announced=False)
    assert stack.champion("commanded", "colour") == {"colour"}
    assert up(stack)["changes"] == ["schedule of commanded: 0 0 1 1 * UTC, its parameter again"]


@pytest.mark.slow
def test_a_line_that_cannot_be_read_stops_no_other(stack: Stack) -> None:
    stack.line("sound")
    head = stack.shell.home / "store" / "lines" / "broken" / "head.json"
    head.parent.mkdir()
    head.write_text("{}")
    try:
        os.kill(pids(stack)["worker-1"], signal.SIGKILL)
        stack.until("it is gone", lambda: not _alive(stack, "worker-1"))
        done = stack.process("up", "--json")
        assert done.json["started"] == ["worker-1"]
        assert "schedule of broken" in done.err
        assert is_on(stack, "sound")
        deployed = stack.process("deploy", "--json")
        assert "schedule of broken" in deployed.err
        states = {line: one["state"] for line, one in deployed.json["schedules"].items()}
        assert (states["broken"], states["sound"]) == ("unknown", "on")
        found = findings(stack, code=6)
        assert found["schedule of broken"]["status"] == "failed"
        assert found["schedule of sound"]["status"] == "ok"
    finally:
        head.unlink()
        head.parent.rmdir()


def test_a_pool_with_a_name_that_prefect_refuses_is_bad_input(stack: Stack) -> None:
    assert "a/b" in stack.process("deploy", "--pool", "a/b", code=3).err


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
