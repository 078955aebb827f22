"""Steps: the decorator, writing to MLflow, the actor, and the log."""

import logging
import socket
import time
from pathlib import Path

import pytest

from restitch.merging.errors import BadInput, Unavailable
from restitch.registry.mlflow.sync import MlflowProjection
from restitch.tasks import publish
from restitch.tasks.runtime.console import say, warn, working
from restitch.tasks.runtime.engine import Cached, step
from restitch.tasks.runtime.workspace import actor, made_by, workspace
from tests.shell import Shell


def test_a_step_returns_the_value_of_a_cached_result() -> None:
    @step("number")
    def number(cached: bool) -> int | Cached[int]:
        return Cached(1) if cached else 2

    assert (number(True), number(False)) == (1, 2)


def test_an_unknown_line_is_refused_with_a_list_of_lines(tmp_path: Path) -> None:
    with Shell(tmp_path).inside(), pytest.raises(BadInput, match="lines: none"):
        workspace().ledger("demo")


def test_the_deployment_can_name_the_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RESTITCH_ACTOR", raising=False)
    assert actor()
    monkeypatch.setenv("RESTITCH_ACTOR", "nightly")
    monkeypatch.setenv("RESTITCH_WORK_POOL", "gpu")
    made = made_by()
    assert isinstance(made, dict)
    assert (made["actor"], made["work_pool"]) == ("nightly", "gpu")


def test_the_actor_of_a_workers_run_is_its_flow_and_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESTITCH_ACTOR", "the account of the workers")
    monkeypatch.setattr("restitch.tasks.runtime.workspace.workers_flow", lambda: "remerge")
    assert actor() == f"remerge@{socket.gethostname()}"


def test_a_slow_unreachable_server_is_not_tried_again_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []
    clock = [1000.0]

    def slow(*_: object, **__: object) -> int:
        attempts.append(clock[0])
        clock[0] += publish.SLOW_SECONDS + 1
        raise Unavailable("MLflow is away")

    monkeypatch.setattr(MlflowProjection, "repair", slow)
    monkeypatch.setattr("restitch.tasks.runtime.workspace.Workspace.ledger", lambda *_, **__: None)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(publish, "_paused_until", {})
    with Shell(tmp_path).inside():
        assert [publish.mirror("demo") for _ in range(3)] == [False] * 3
        assert len(attempts) == 1
        clock[0] += publish.PAUSE_SECONDS
        publish.mirror("demo")
    assert len(attempts) == 2


def test_without_a_terminal_steps_write_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "restitch"), working("some work") as progress:
        progress(1, 2)
        say("a fact")
        warn("a warning")
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("INFO", "some work"),
        ("INFO", "a fact"),
        ("WARNING", "a warning"),
    ]
