"""Commands notify of the acts that a line asks for, and work without anybody who listens."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from restitch.deployments.server import entry
from restitch.flows import onboard as onboarding
from restitch.tasks.runtime.crash_recovery import MAX_CRASHES
from tests.fake_prefect import fake_prefect
from tests.notify_server import NotifyServer, notify_server
from tests.shell import Shell
from tests.worlds import World

pytestmark = pytest.mark.usefixtures("without_mlflow")

ALL = ("promoted", "rejected", "held", "quarantined", "rolled-back", "drop", "crashes")


@pytest.fixture
def server() -> Iterator[NotifyServer]:
    with notify_server() as found:
        yield found


@pytest.fixture
def notifying(shell: Shell, server: NotifyServer) -> Shell:
    address = f"json://{server.host}/hook"
    return Shell(shell.home, {"RESTITCH_ACTOR": "ann", "RESTITCH_NOTIFY_URLS": address})


def acts_of(titles: list[str]) -> list[str]:
    """The acts in the titles of messages, without the values that decided."""
    return [title.removeprefix("demo: ").partition(":")[0] for title in titles]


def test_each_act_of_a_line_is_one_message(
    world: World, notifying: Shell, server: NotifyServer, tmp_path: Path
) -> None:
    file = tmp_path / "line.yaml"
    notifying("init", world.line(file, gates={"min_retention": 0.25}, notify=list(ALL)))
    notifying.add(world, "colour")
    notifying.add(world, "wreck", code=5)
    notifying.add(world, "number")
    notifying("remerge", "demo")
    notifying("rollback", "demo", "1", "--reason", "it was slow")
    notifying("rollback", "demo", "1", "--reason", "again")
    acts = [f"{act.kind} {act.reason}" for act in notifying.acts() if act.kind in ALL]
    assert acts_of(server.titles) == [act.partition(":")[0] for act in acts]
    assert {act.partition(" ")[0] for act in acts} == {
        "promoted",
        "rejected",
        "held",
        "rolled-back",
    }
    held = next(m for m in server.messages if m["title"].startswith("demo: held wreck 1"))
    assert "0.25" in held["title"]
    assert "By ann at " in held["message"]


def test_the_third_death_of_a_worker_at_a_model_is_one_message(
    world: World,
    notifying: Shell,
    server: NotifyServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    notifying("init", world.line(tmp_path / "line.yaml", notify=["crashes"]))
    files = ("--task", world.task("colour"), "--model", world.model("colour"))
    with fake_prefect() as prefect:
        prefect.knows_deployments()
        team = {**notifying.environment, "PREFECT_API_URL": prefect.url}
        Shell(notifying.home, team)("register", "demo", *files)
    with notifying.inside(), monkeypatch.context() as patched:
        patched.setattr(onboarding, "validate", _dies)
        for _ in range(MAX_CRASHES):
            with pytest.raises(MemoryError):
                onboarding.onboard.body("demo", "colour", 1)
    assert server.messages == []
    for _ in range(2):
        notifying("remerge", "demo")
    (message,) = server.messages
    assert message["title"].startswith("demo: quarantined colour 1: 3 processes died")
    assert message["type"] == "failure"
    assert "register the model again" in message["message"]


def _dies(*_: object, **__: object) -> None:
    raise MemoryError


def test_a_remerge_that_crashes_three_times_is_one_message(
    world: World, notifying: Shell, server: NotifyServer, tmp_path: Path
) -> None:
    notifying("init", world.line(tmp_path / "line.yaml", notify=["crashes"]))
    flow, state = SimpleNamespace(name="remerge"), SimpleNamespace(message="exited with -9")
    with fake_prefect() as prefect, notifying.inside(), pytest.MonkeyPatch.context() as patched:
        patched.setenv("PREFECT_API_URL", prefect.url)
        prefect.knows_deployments()
        for attempt in range(MAX_CRASHES):
            parameters = {"line": "demo", "attempt": attempt}
            run = SimpleNamespace(id=f"run-{attempt}", name="a-run", parameters=parameters)
            entry.restart(flow, run, state)
    (message,) = server.messages
    assert message["title"] == "demo: remerge crashed 3 times"
    assert "exited with -9" in message["message"]
    assert "restitch status demo" in message["message"]


@pytest.mark.parametrize("status", [403, 500])
def test_a_command_does_not_fail_with_its_notification(
    world: World, notifying: Shell, server: NotifyServer, tmp_path: Path, status: int
) -> None:
    server.status = status
    notifying("init", world.line(tmp_path / "line.yaml", notify=["promoted"]))
    files = ("--task", world.task("colour"), "--model", world.model("colour"))
    done = notifying("register", "demo", *files)
    assert "a notification was not sent: address 1 of 1 in RESTITCH_NOTIFY_URLS (json)" in done.err
    assert f"error={status}" in done.err
    assert notifying.state().champion == 1


def test_init_and_doctor_warn_of_addresses_that_are_missing_or_unknown(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    file = world.line(tmp_path / "line.yaml", notify=["held"])
    assert "RESTITCH_NOTIFY_URLS is not set" in shell("init", file).err
    (check,) = notifications(shell)
    assert check["status"] == "warning"
    assert "lines demo: RESTITCH_NOTIFY_URLS is not set" in check["found"]
    assert "RESTITCH_NOTIFY_URLS" in check["remedy"]
    two = Shell(shell.home, {"RESTITCH_NOTIFY_URLS": "json://127.0.0.1/x nothing://pl4nted"})
    done = two("init", file)
    assert "apprise does not know address 2 of 2 in RESTITCH_NOTIFY_URLS" in done.err
    assert "pl4nted" not in done.err + done.out
    assert [check["status"] for check in notifications(two)] == ["warning", "ok"]


def test_a_line_that_asks_for_nothing_needs_no_addresses(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    assert shell("init", world.line(tmp_path / "line.yaml")).err == ""
    assert notifications(shell) == []


def notifications(shell: Shell) -> list[dict[str, str]]:
    checks = shell.json("doctor", code=None)["checks"]
    return [check for check in checks if check["name"] == "notifications"]


def test_a_wrong_event_is_refused_and_nothing_is_made(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    done = shell("init", world.line(tmp_path / "line.yaml", notify=["promotd"]), code=3)
    assert "notify" in done.err
    assert "promotd" in done.err
    assert shell.head_bytes() is None
