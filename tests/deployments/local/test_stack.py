"""Registered, and merged by workers: real servers and real processes, from event to champion."""

import fcntl
import getpass
import json
import os
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import psutil
import pytest

from restitch.flows.onboard import attempts_at
from restitch.modeling.device import device
from restitch.registry.ledger.finetuned_models import ModelKey
from restitch.registry.mlflow.projection import DIGEST_TAG, STATE_TAG, VERSION_TAG
from restitch.registry.store.attempts import Attempt, process_began
from tests.conftest import Three
from tests.deployments.conftest import PATIENCE, PLANTED, Stack
from tests.stress.test_secrets import leaks
from tests.worlds import SKILLS

# The first test also waits for all servers; a busy machine takes its time.
pytestmark = [pytest.mark.servers, pytest.mark.timeout(600)]

# All acts of a line with one model that went straight into the champion.
ONE = ["configured", "registered", "localized", "merged", "promoted"]


@pytest.fixture(scope="module")
def begun(stack: Stack) -> dict[str, Any]:
    """Begin everything at once; the workers take it one after the other, the tests look.

    Returns:
        What the command printed that registered the model of `demo`.
    """
    for line in ("demo", "trained", "lost", "many", "killed"):
        stack.line(line)
    files = ("--task", stack.world.task("colour"), "--model", stack.world.model("colour"))
    process = stack.shell.start("register", "demo", *files, "--json", environment=stack.environment)
    stack.shell("task", "trained", "--task", stack.world.task("colour"))
    stack.train("trained", "colour")
    stack.register("lost", "colour", announced=False)
    for task in SKILLS:
        stack.register("many", task)
    for line in ("lost", "many"):  # by the schedule, in the midst of it
        stack.remerge(line, f"{line} by the schedule")
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    _init_clock(stack, every_minute_later())
    told: dict[str, Any] = json.loads(out)
    return told


@pytest.fixture(scope="module")
def clock(stack: Stack, begun: dict[str, Any]) -> list[datetime]:
    """When the line `clock` was to be remerged, before its schedule was changed."""
    times = stack.until("runs are planned", lambda: planned(stack, "clock"))
    _init_clock(stack, "30 3 * * *")
    return times


def every_minute_later() -> str:
    """A schedule of more minutes in a row than Prefect plans; no test sees the first of them."""
    hour = (datetime.now(UTC).hour + 12) % 24
    return f"* {hour},{(hour + 1) % 24} * * *"


def _init_clock(stack: Stack, schedule: str) -> None:
    file = stack.shell.home.parent / "clock.yaml"
    stack.process("init", stack.world.line(file, line="clock", schedule=schedule))


def planned(stack: Stack, line: str) -> list[datetime]:
    """When the server will remerge a line, as far as it has planned."""
    runs = stack.runs("remerge", line, "SCHEDULED")
    times = [datetime.fromisoformat(run["expected_start_time"]) for run in runs]
    return sorted(time for time in times if time > datetime.now(UTC))


def under_way(stack: Stack, line: str) -> list[str]:
    """The remerges of a line that are at work, or wait for a worker."""
    now = datetime.now(UTC)
    runs = stack.runs("remerge", line, "SCHEDULED", "PENDING", "RUNNING")
    return [r["id"] for r in runs if datetime.fromisoformat(r["expected_start_time"]) <= now]


def intact(stack: Stack, line: str) -> list[str]:
    """The kinds of a line's acts, once the trail and the history have been walked whole."""
    ledger = stack.shell.ledger(line)
    entries = list(ledger.entries(newest_first=False))
    assert [entry.sequence for entry in entries] == list(range(1, len(entries) + 1))
    records = list(ledger.history())
    assert [record.version for record in records] == list(range(len(records), 0, -1))
    merged = [entry.digests["recipe"] for entry in entries if entry.kind == "merged"]
    assert merged == [record.recipe_digest for record in reversed(records)]
    made: set[str] = set()
    for entry in entries:
        if entry.kind in ("retired", "restored"):
            # Without the member that joined last the line is again what it has been.
            made.clear()
        if entry.kind == "merged":
            assert entry.digests["recipe"] not in made, f"{entry.reason} was made twice"
            made.add(entry.digests["recipe"])
    return [entry.kind for entry in entries]


def test_a_registration_is_handed_over_and_the_champion_follows(
    stack: Stack, begun: dict[str, Any], three: Three
) -> None:
    assert (begun["handed_over"], begun["state"]) == (True, "registered")
    assert begun["champion"] is None, "the command has not waited"
    assert stack.champion("demo", "colour") == {"colour"}
    assert stack.shell.patch_bytes() == three.shell.patch_bytes(1)
    assert intact(stack, "demo") == ONE


def test_localization_ran_in_a_process_of_the_pool_gpu(stack: Stack, begun: dict[str, Any]) -> None:
    stack.champion("demo", "colour")
    facts = stack.shell.state().tasks["colour"].versions[1].facts
    found: Any = facts.localized_by
    assert found["work_pool"] == "gpu"
    assert found["worker"] in {f"{socket.gethostname()}-worker-{n}" for n in (1, 2)}
    assert (found["host"], found["device"]) == (socket.gethostname(), device().type)
    assert found["pid"] != os.getpid()
    (run,) = _runs_of(stack, found["pid"])
    assert run["work_pool_name"] == "gpu"
    deployment = stack.prefect.deployment("onboard/restitch")
    assert deployment is not None
    assert run["deployment_id"] == deployment["id"]


def _runs_of(stack: Stack, pid: int) -> list[dict[str, Any]]:
    """The runs in which a process onboarded; of any line, for lines share masks."""
    store = stack.shell.ledger().objects.store
    begun = [name for name in store.list("attempts") if name.endswith(".begun")]
    facts = [json.loads(store.read(name)) for name in begun]
    found = [stack.prefect.run(fact["run"]) for fact in facts if fact["pid"] == pid]
    return [run for run in found if run is not None]


def test_acts_of_workers_name_the_flow_and_the_host(stack: Stack, begun: dict[str, Any]) -> None:
    stack.champion("demo", "colour")
    actors = {entry.kind: entry.actor for entry in stack.shell.acts("demo")}
    host, person = socket.gethostname(), getpass.getuser()
    assert actors == {
        "configured": person,
        "registered": person,
        "localized": f"onboard@{host}",
        "merged": f"remerge@{host}",
        "promoted": f"remerge@{host}",
    }


def test_prefect_plans_the_runs_of_a_schedule(clock: list[datetime]) -> None:
    assert {time.second for time in clock} == {0}
    assert {(after - time).seconds for time, after in pairwise(clock)} == {60}


def test_a_version_registered_in_mlflow_joins_by_its_webhook(
    stack: Stack, begun: dict[str, Any], three: Three
) -> None:
    assert stack.champion("trained", "colour") == {"colour"}
    assert stack.shell.patch_bytes(line="trained") == three.shell.patch_bytes(1)
    assert intact(stack, "trained").count("registered") == 1
    client, name = stack.mlflow, "trained.colour"

    def shown() -> dict[str, str] | None:
        tags: dict[str, str] = client.get_model_version(name, "1").tags
        return tags if tags.get(STATE_TAG) == "ready" else None

    tags = stack.until("MLflow shows the state", shown)
    model = stack.shell.state("trained").tasks["colour"].versions[1].model
    assert (tags[DIGEST_TAG], tags[VERSION_TAG]) == (model.weights, "1")
    assert tags["team"] == "vision", "what others have written stays"
    assert len(client.search_model_versions(f"name = '{name}'")) == 1
    assert len(stack.runs("onboard", "trained")) == 1


def test_a_lost_event_is_repaired_by_the_schedule_and_nothing_is_started_twice(
    stack: Stack, begun: dict[str, Any], three: Three
) -> None:
    assert stack.champion("lost", "colour") == {"colour"}
    assert stack.shell.patch_bytes(line="lost") == three.shell.patch_bytes(1)
    stack.finished(stack.remerge("lost", "again"))
    assert [run["work_pool_name"] for run in stack.runs("onboard", "lost")] == ["gpu"]
    assert intact(stack, "lost") == ONE


def test_many_registrations_at_once_end_in_one_champion_with_all(
    stack: Stack, begun: dict[str, Any], three: Three
) -> None:
    assert stack.champion("many", *SKILLS) == set(SKILLS)
    assert stack.shell.patch_bytes(line="many") == three.shell.patch_bytes()
    stack.until("nothing more is under way", lambda: not under_way(stack, "many"))
    acts = intact(stack, "many")
    assert (acts.count("registered"), acts.count("localized")) == (3, 3)
    assert acts.count("promoted") == acts.count("merged") == stack.shell.state("many").newest
    assert stack.shell.patch_bytes(line="many") == three.shell.patch_bytes()


def test_a_killed_run_starts_again_by_itself(
    stack: Stack, begun: dict[str, Any], three: Three
) -> None:
    stack.register("killed", "colour")
    with nothing_swapped(stack, "killed"):
        pid = stack.until("a process onboards it", lambda: _at_work(stack, "killed"))
        process = psutil.Process(pid)
        workers = {p.pid for n, p in stack.file.processes.items() if n.startswith("worker")}
        assert workers & {parent.pid for parent in process.parents()}
        process.send_signal(signal.SIGKILL)
        stack.until("it is gone", lambda: process_began(pid) is None)
    assert stack.champion("killed", "colour") == {"colour"}
    assert stack.shell.patch_bytes(line="killed") == three.shell.patch_bytes(1)
    assert intact(stack, "killed") == ONE
    ended = {stack.finished(run["id"])["state_type"] for run in stack.runs("onboard", "killed")}
    assert ended == {"COMPLETED", "CRASHED"}
    (died,) = _attempts(stack, "killed")
    assert died.facts["pid"] == pid


@contextmanager
def nothing_swapped(stack: Stack, line: str) -> Iterator[None]:
    """Keep a line's head as it is; who would change it waits."""
    lock = stack.shell.home / "store" / ".locks" / f"lines,{line},head.json"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _attempts(stack: Stack, line: str) -> list[Attempt]:
    """The attempts at the line's model that have begun and not ended."""
    with stack.shell.inside():
        return attempts_at(stack.shell.ledger(line), ModelKey("colour", 1)).unfinished()


def _at_work(stack: Stack, line: str) -> int | None:
    """The process that onboards the line's model."""
    begun = _attempts(stack, line)
    return int(begun[0].facts["pid"]) if begun else None


def test_a_changed_schedule_replaces_the_planned_runs(stack: Stack, clock: list[datetime]) -> None:
    def at_night() -> bool:
        return {(time.hour, time.minute) for time in planned(stack, "clock")} == {(3, 30)}

    stack.until("the plan has changed", at_night)


def test_workers_and_the_alias_follow_a_decision(
    stack: Stack, begun: dict[str, Any], three: Three
) -> None:
    stack.champion("many", *SKILLS)
    _idle(stack, "many")
    whole, name = stack.shell.state("many").champion, "many"
    assert whole is not None

    def alias() -> int:
        version = stack.mlflow.get_model_version_by_alias(name, "champion")
        return int(version.tags[VERSION_TAG])

    told = json.loads(
        stack.process("retire", "many", "animal", "--reason", "withdrawn", "--json").out
    )
    assert (told["done"], told["handed_over"], told["merged"]) == (True, True, None)

    def without() -> bool:
        champion = stack.shell.state("many").champion
        record = stack.shell.ledger("many").merged(champion or whole)
        return set(record.members) == {"colour", "number"}

    stack.until("the workers have merged without the retired model", without)
    # The same two models as in the second version of a line that never had the third.
    assert stack.shell.patch_bytes(line="many") == three.shell.patch_bytes(2)
    _idle(stack, "many")
    assert alias() == stack.shell.state("many").champion
    stack.process("rollback", "many", whole, "--reason", "a test")
    assert alias() == whole
    run = stack.remerge("many", "many after the rollback")
    stack.finished(run)
    assert stack.shell.state("many").champion == whole
    assert intact(stack, "many")[-1] in ("rolled-back", "merged")
    found = json.loads(stack.process("verify", "many", "--json").out)
    assert found["intact"]
    assert found["mlflow"]

    def linked() -> dict[str, Any] | None:
        shown: dict[str, Any] = json.loads(stack.process("show", "many", "--json").out)
        return shown if shown["links"]["mlflow"] else None

    # A look waits a second for MLflow at most, which a busy machine does not always keep.
    shown = stack.until("MLflow has told its address of the version", linked)
    assert "/runs/" in shown["links"]["mlflow"]
    assert shown["links"]["prefect"].endswith(shown["made_by"]["flow_run"])


def _idle(stack: Stack, line: str) -> None:
    stack.until(f"nothing is under way on {line}", lambda: not under_way(stack, line))


def test_no_secret_is_in_logs_databases_or_records(stack: Stack, begun: dict[str, Any]) -> None:
    home = stack.shell.home
    stack.champion("demo", "colour")
    shown = [stack.process("doctor", code=None)]
    # A worker that fails, and deliveries with the right secret in the wrong places.
    deployment = stack.prefect.deployment("onboard/restitch")
    assert deployment is not None
    nothing = {"line": "demo", "task": "nothing", "version": 9}
    run = stack.prefect.create_run(deployment["id"], nothing, "fails")
    assert stack.finished(str(run["id"]))["state_type"] == "FAILED"
    own = (home / "secrets" / "webhook-secret").read_text()
    for header in ("X-MLflow-Signature", "Authorization", "X-MLflow-Delivery-Id"):
        request = urllib.request.Request(
            str(stack.file.webhook_url), json.dumps({"x": own}).encode(), {header: own}
        )
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(request)
    logs = {path.name for path in (home / "logs").glob("*.log")}
    assert logs == {
        f"{name}.log" for name in ("prefect", "mlflow", "webhook", "worker-1", "worker-2")
    }
    keys = {path.name: path.read_text() for path in (home / "secrets").iterdir()}
    assert {"webhook-secret", "webhook-encryption-key"} <= keys.keys()
    found = leaks(home, shown, {**PLANTED, **keys})
    assert [place for place in found if " in secrets/" not in place] == []
