"""Registered, and merged by workers: real servers and real processes, from event to champion."""

import fcntl
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import psutil
import pytest

from flows.onboard import attempts_at
from registry.image import DIGEST_TAG, STATE_TAG, VERSION_TAG
from tasks.models import device
from tests.conftest import Three
from tests.deployments.conftest import NEVER, Stack
from tests.worlds import SKILLS

EVERY_MINUTE = "* * * * *"


@pytest.fixture(scope="module")
def first(stack: Stack) -> dict[str, Any]:
    """What the command said that registered the first model of the line `demo`."""
    stack.line("demo")
    files = ("--task", stack.world.task("colour"), "--model", stack.world.model("colour"))
    told: dict[str, Any] = stack.process("register", "demo", *files, "--json").json
    return told


@pytest.fixture(scope="module")
def clock(stack: Stack) -> Stack:
    """A line with a schedule of its own, made by the command while the servers run."""
    file = stack.world.line(
        stack.shell.home.parent / "clock.yaml", line="clock", schedule=EVERY_MINUTE
    )
    stack.process("init", file)
    return stack


def planned(stack: Stack, line: str) -> list[datetime]:
    """When the server will remerge a line, as far as it has planned."""
    runs = stack.runs("remerge", line, "SCHEDULED")
    times = [datetime.fromisoformat(run["expected_start_time"]) for run in runs]
    return sorted(time for time in times if time > datetime.now(UTC))


def intact(stack: Stack, line: str) -> list[str]:
    """The kinds of a line's acts, once the trail and the history have been walked whole."""
    ledger = stack.shell.ledger(line)
    entries = list(ledger.entries(newest_first=False))
    assert [entry.sequence for entry in entries] == list(range(1, len(entries) + 1))
    records = list(ledger.history())
    assert [record.version for record in records] == list(range(len(records), 0, -1))
    recipes = [record.recipe_digest for record in records]
    assert len(set(recipes)) == len(recipes), "no version was made twice"
    return [entry.kind for entry in entries]


def test_a_registration_is_handed_over_and_the_champion_follows(
    clock: Stack, stack: Stack, first: dict[str, Any], three: Three
) -> None:
    assert (first["handed_over"], first["state"]) == (True, "registered")
    assert first["champion"] is None, "the command has not waited"
    assert stack.champion("demo", "colour") == {"colour"}
    assert stack.shell.patch_bytes() == three.shell.patch_bytes(1)
    assert intact(stack, "demo") == [
        *("configured", "registered", "localized", "merged", "promoted")
    ]


def test_localization_ran_in_a_process_of_the_pool_gpu(stack: Stack, first: dict[str, Any]) -> None:
    stack.champion("demo", "colour")
    facts: Any = stack.shell.head().tasks["colour"].versions[1].facts
    found = facts["localized_by"]
    assert found["work_pool"] == "gpu"
    assert found["worker"] in {f"{socket.gethostname()}-worker-{n}" for n in (1, 2)}
    assert (found["host"], found["device"]) == (socket.gethostname(), device().type)
    (run,) = stack.runs("onboard", "demo")
    assert (run["name"], run["work_pool_name"]) == ("demo/colour/1", "gpu")
    # The worker knows its child by this number; the test and the command have others.
    assert run["infrastructure_pid"] == str(found["pid"])
    assert found["pid"] != os.getpid()


def test_a_version_that_mlflow_alone_has_joins_by_its_webhook(
    stack: Stack, three: Three
) -> None:
    stack.line("trained")
    stack.shell("task", "trained", "--task", stack.world.task("colour"))
    client, name = stack.mlflow, "trained.colour"
    run = client.create_run(client.create_experiment("training"))
    client.log_artifacts(run.info.run_id, str(stack.world.model("colour")), "model")
    client.create_registered_model(name)
    source = f"{run.info.artifact_uri}/model"
    client.create_model_version(name, source, run.info.run_id, {"team": "vision"})
    assert stack.champion("trained", "colour") == {"colour"}
    assert stack.shell.patch_bytes(line="trained") == three.shell.patch_bytes(1)
    assert intact(stack, "trained").count("registered") == 1
    (version,) = client.search_model_versions(f"name = '{name}'")
    model = stack.shell.head("trained").tasks["colour"].versions[1].model
    assert version.tags[DIGEST_TAG] == model.weights
    assert (version.tags[VERSION_TAG], version.tags["team"]) == ("1", "vision")
    shown = lambda: client.get_model_version(name, "1").tags[STATE_TAG] == "ready"  # noqa: E731
    stack.until("MLflow shows the state", shown)
    assert len(stack.runs("onboard", "trained")) == 1


def test_a_lost_event_is_repaired_by_the_schedule_and_nothing_is_started_twice(
    stack: Stack, three: Three
) -> None:
    stack.line("lost")
    stack.register("lost", "colour", announced=False)
    assert stack.runs("onboard", "lost") == []
    # Two that come together, as after an outage.
    repairs = [stack.remerge("lost", f"repair {number}") for number in range(2)]
    assert stack.champion("lost", "colour") == {"colour"}
    repairs.append(stack.remerge("lost", "after it"))
    ended = {stack.finished(run)["state_type"] for run in repairs}
    assert ended <= {"COMPLETED", "CANCELLED"}
    assert [run["work_pool_name"] for run in stack.runs("onboard", "lost")] == ["gpu"]
    assert stack.shell.patch_bytes(line="lost") == three.shell.patch_bytes(1)
    assert intact(stack, "lost") == [
        *("configured", "registered", "localized", "merged", "promoted")
    ]


def test_two_lines_do_not_disturb_each_other(stack: Stack) -> None:
    members = {"left": "colour", "right": "number"}
    for line in members:
        stack.line(line)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda line: stack.process(*_registration(stack, line)), members))
    for line, task in members.items():
        assert stack.champion(line, task) == {task}
        assert intact(stack, line) == [
            *("configured", "registered", "localized", "merged", "promoted")
        ]


def _registration(stack: Stack, line: str) -> tuple[object, ...]:
    task = {"left": "colour", "right": "number"}[line]
    files = ("--task", stack.world.task(task), "--model", stack.world.model(task))
    return ("register", line, *files)


def test_many_at_once_end_in_one_champion_that_holds_them_all(stack: Stack, three: Three) -> None:
    stack.line("many")
    for task in SKILLS:
        stack.register("many", task)
    # The schedule comes in between, which would onboard them as well.
    runs = [stack.remerge("many", f"schedule {number}") for number in range(2)]
    assert stack.champion("many", *SKILLS) == set(SKILLS)
    for run in runs:
        stack.finished(run)
    assert stack.shell.patch_bytes(line="many") == three.shell.patch_bytes()
    acts = intact(stack, "many")
    assert (acts.count("registered"), acts.count("localized")) == (3, 3)
    assert acts.count("promoted") == stack.shell.head("many").newest, "each version had its turn"


def test_a_run_that_is_killed_is_made_again_without_a_person(stack: Stack, three: Three) -> None:
    stack.line("killed")
    stack.register("killed", "colour")
    with nothing_swapped(stack, "killed"):
        pid = stack.until("a process onboards it", lambda: _at_work(stack, "killed"))
        process = psutil.Process(pid)
        workers = {p.pid for n, p in stack.file.processes.items() if n.startswith("worker")}
        assert workers & {parent.pid for parent in process.parents()}
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert stack.champion("killed", "colour") == {"colour"}
    assert stack.shell.patch_bytes(line="killed") == three.shell.patch_bytes(1)
    assert intact(stack, "killed").count("localized") == 1
    runs = stack.runs("onboard", "killed")
    assert sorted(run["state_type"] for run in runs) == ["COMPLETED", "CRASHED"]
    with stack.shell.inside():
        (died,) = attempts_at(stack.shell.ledger("killed"), "colour", 1).unfinished()
    assert died.facts["pid"] == pid


@contextmanager
def nothing_swapped(stack: Stack, line: str) -> Iterator[None]:
    """Keep a line's head as it is; who would change it waits."""
    lock = stack.shell.home / "store" / ".locks" / f"lines,{line},head.json"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _at_work(stack: Stack, line: str) -> int | None:
    """The process that has a mask for the model and waits to enter it in the head."""
    with stack.shell.inside():
        begun = attempts_at(stack.shell.ledger(line), "colour", 1).unfinished()
    return int(begun[0].facts["pid"]) if begun else None


def test_a_line_is_remerged_by_its_schedule_and_a_changed_one_counts_at_once(
    clock: Stack,
) -> None:
    times = clock.until("runs are planned", lambda: planned(clock, "clock"))
    assert all(time.second == 0 for time in times)
    done = clock.until("one has run", lambda: clock.runs("remerge", "clock", "COMPLETED"))
    assert done[0]["parameters"]["line"] == "clock"
    assert done[0]["auto_scheduled"]
    file = clock.shell.home.parent / "clock.yaml"
    clock.process("init", clock.world.line(file, line="clock", schedule=NEVER))
    clock.until(
        "the plan has changed",
        lambda: {(t.month, t.day, t.hour, t.minute) for t in planned(clock, "clock")}
        == {(1, 1, 0, 0)},
    )
