"""The command with workers: hand over, wait, watch, and refuse."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from restitch.registry.ledger.line_state import LineState
from restitch.tasks.runtime.run_progress import run_progress
from tests.conftest import NewHome
from tests.fake_prefect import FakePrefect, fake_prefect
from tests.shell import Shell
from tests.worlds import World

pytestmark = pytest.mark.usefixtures("without_mlflow")


@pytest.fixture
def prefect() -> Iterator[FakePrefect]:
    """A server with deployments and without workers."""
    with fake_prefect() as found:
        found.knows_deployments()
        yield found


@pytest.fixture
def embedded(shell: Shell, world: World, tmp_path: Path) -> Shell:
    """A line, without a server."""
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    return shell


@pytest.fixture
def handing_over(embedded: Shell, prefect: FakePrefect) -> Shell:
    """The same home with a Prefect server."""
    return Shell(embedded.home, {"PREFECT_API_URL": prefect.url})


def registration(world: World, task: str = "colour", model: str = "") -> tuple[object, ...]:
    files = ("--task", world.task(task), "--model", world.model(model or task))
    return ("register", "demo", *files)


def test_a_registration_is_recorded_and_announced_and_not_onboarded(
    handing_over: Shell, world: World, prefect: FakePrefect
) -> None:
    told = handing_over.add(world, "colour")
    assert (told["handed_over"], told["state"], told["champion"]) == (True, "registered", None)
    ((event,),) = prefect.bodies("POST /events")
    assert event["event"] == "restitch.model.registered"
    assert (event["payload"]["task"], event["payload"]["version"]) == ("colour", 1)
    assert handing_over.kinds() == ["configured", "registered"]


def test_registering_again_announces_unfinished_work_again(
    handing_over: Shell, world: World, prefect: FakePrefect
) -> None:
    first, second = handing_over.add(world, "colour"), handing_over.add(world, "colour")
    assert (first["already"], second["already"]) == (False, True)
    assert len(prefect.bodies("POST /events")) == 2
    assert handing_over.kinds() == ["configured", "registered"]


def test_a_registration_on_a_paused_line_is_not_announced(
    handing_over: Shell, embedded: Shell, world: World, prefect: FakePrefect
) -> None:
    embedded("pause", "demo", "--reason", "the host is repaired")
    told = handing_over.add(world, "colour")
    assert (told["handed_over"], told["state"]) == (False, "registered")
    assert told["paused"]["reason"] == "the host is repaired"
    assert prefect.bodies("POST /events") == []


def test_a_pause_ends_the_wait_for_a_model(
    handing_over: Shell, embedded: Shell, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    when_waited_for(monkeypatch, lambda: embedded("pause", "demo", "--reason", "repair"))
    done = handing_over(*registration(world), "--wait", "--timeout", "60", code=6)
    assert "line demo is paused: colour version 1 is registered and waits" in done.err
    assert "restitch resume demo" in done.err


def test_a_lost_event_is_a_warning_and_the_model_is_registered(
    handing_over: Shell, world: World, prefect: FakePrefect
) -> None:
    prefect.answers["POST /events"] = (500, {"detail": "no"})
    done = handing_over(*registration(world))
    assert "the scheduled remerge picks it up" in done.err
    assert handing_over.kinds() == ["configured", "registered"]


def test_waiting_ends_with_a_message_when_no_worker_answers(
    handing_over: Shell, world: World
) -> None:
    done = handing_over(*registration(world), "--wait", "--timeout", "0.1", code=6)
    assert "colour version 1 is not in the merged model yet" in done.err
    assert "it is registered" in done.err
    assert "the workers continue" in done.err
    assert "restitch doctor" in done.err
    assert handing_over.state().tasks["colour"].versions[1].state == "registered"


def test_waiting_shows_the_state_and_the_run_that_works_on_the_model(
    handing_over: Shell, world: World, prefect: FakePrefect
) -> None:
    run = {"id": "r1", "name": "demo/colour/1", "state_type": "RUNNING", "state_name": "Running"}
    other = {**run, "id": "r2", "parameters": {"line": "demo", "task": "number"}}
    runs = [other, {**run, "parameters": {"line": "demo", "task": "colour"}}]
    prefect.answers["POST /flow_runs/filter"] = (200, runs)
    prefect.answers["POST /artifacts/filter"] = (200, [{"data": 40}])
    done = handing_over(*registration(world), "--wait", "--timeout", "0.1", code=6)
    page = f"{prefect.url.removesuffix('/api')}/runs/flow-run/r1"
    assert f"colour version 1 is registered: run demo/colour/1 is running, {page}" in done.err
    with handing_over.inside():
        progress = run_progress("demo", "colour", "registered")
    assert progress == (f"run demo/colour/1 is running, {page}", 40)


def test_waiting_returns_when_the_model_is_in_the_champion(
    handing_over: Shell, embedded: Shell, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    when_waited_for(monkeypatch, lambda: embedded.add(world, "colour"))
    told = handing_over.add(world, "colour", "--wait", "--timeout", "60")
    assert (told["handed_over"], told["state"], told["champion"]) == (True, "ready", 1)
    assert told["record"]["members"].keys() == {"colour"}


def test_waiting_for_a_model_that_cannot_join_exits_with_4(
    handing_over: Shell, embedded: Shell, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ("--task", world.task("colour"), "--model", world.base)
    quarantine = lambda: embedded("register", "demo", *files, code=4)  # noqa: E731
    when_waited_for(monkeypatch, quarantine)
    told = handing_over.json("register", "demo", *files, "--wait", "--timeout", "60", code=4)
    assert (told["state"], told["champion"]) == ("quarantined", None)
    assert told["reason"]
    again = handing_over.json("register", "demo", *files, "--wait", code=4)
    assert (again["already"], again["state"]) == (True, "quarantined")


def when_waited_for(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> None:
    """Do a worker's work during the first pause of the waiting command."""
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 1:
            with patch.dict(os.environ):
                del os.environ["PREFECT_API_URL"]
                work()

    class Clock:
        sleep = staticmethod(pause)
        monotonic = staticmethod(time.monotonic)

    monkeypatch.setattr("restitch.flows.register.time", Clock)


def test_here_does_the_work_in_spite_of_workers(
    embedded: Shell, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("restitch.flows.register.has_workers", lambda: True)
    told = embedded.add(world, "colour", "--here")
    assert (told["handed_over"], told["champion"]) == (False, 1)


@pytest.mark.parametrize("name", ["PREFECT_API_URL", "MLFLOW_TRACKING_URI"])
def test_up_refuses_if_other_servers_are_named(tmp_path: Path, name: str) -> None:
    shell = Shell(tmp_path / "home", {name: "http://user:secret@team:4200/api"})
    done = shell("up", code=3)
    assert f"{name} is set" in done.err
    assert "unset it" in done.err
    assert "secret" not in done.err
    assert not (tmp_path / "home" / "stack.json").exists()


def test_down_without_a_stack_stops_nothing(tmp_path: Path) -> None:
    assert Shell(tmp_path / "home").json("down") == {"stopped": []}
    assert not (tmp_path / "home").exists()


def test_deploy_without_a_server_says_what_is_missing(tmp_path: Path) -> None:
    done = Shell(tmp_path)("deploy", code=3)
    assert "restitch up" in done.err
    assert "PREFECT_API_URL" in done.err


def test_watching_prints_each_state_once_until_ctrl_c(embedded: Shell) -> None:
    process = embedded.start("status", "--watch", "--json")
    guard = threading.Timer(120, process.kill)
    guard.start()
    try:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        assert first["lines"][0]["pinned"] is False
        embedded.ledger().act("configured", "me", "pin it", pinned)
        second = json.loads(process.stdout.readline())
        assert second == {**first, "lines": [{**first["lines"][0], "pinned": True}]}
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        guard.cancel()
        process.kill()
        process.wait()
    assert (process.returncode, out) == (0, ""), err
    assert "Traceback" not in err


def pinned(line_state: LineState) -> LineState:
    return line_state.model_copy(update={"pinned": True})


def test_a_model_that_killed_three_processes_is_quarantined_and_tried_again_when_registered(
    new_home: NewHome, world: World, tmp_path: Path
) -> None:
    shell = new_home("deadly")
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    shell.python(DIES, world.task("colour"), world.model("colour"))
    assert shell.state().tasks["colour"].versions[1].state == "registered"
    told = shell.json("remerge", "demo")
    model = shell.state().tasks["colour"].versions[1]
    assert (told["action"], model.state, model.facts.deaths) == ("empty", "quarantined", 3)
    assert "3 processes died while they onboarded" in str(model.reason)
    assert shell.json("remerge", "demo")["action"] == "empty"
    assert shell.kinds().count("quarantined") == 1, "it is not tried for ever"
    again = shell.add(world, "colour")
    assert (again["already"], again["state"], again["champion"]) == (True, "ready", 1)


# Three children without MLflow, each killed after it began to onboard, as by a lack of memory.
# The parent imports what each of them would import for seconds.
DIES = """
import os, signal, sys
from pathlib import Path
import datasets
from transformers import AutoTokenizer, BertModel
import restitch.flows.onboard
from restitch.flows.register import register
from restitch.registry.mlflow.sync import MlflowProjection

MlflowProjection.repair = lambda *_, **__: 0
restitch.flows.onboard.validate = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        register("demo", Path(sys.argv[1]), sys.argv[2])
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, status
"""
