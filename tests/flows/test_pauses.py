"""A paused line is left alone until a person resumes it; what people register is recorded."""

from pathlib import Path
from typing import Any

import pytest

from restitch.registry.ledger.line_state import LineState, Pause
from tests.flows.test_decisions import Line
from tests.shell import Shell
from tests.worlds import World

pytestmark = pytest.mark.usefixtures("without_mlflow")


@pytest.fixture
def line(world: World, shell: Shell, tmp_path: Path) -> Line:
    return Line(world, shell, tmp_path, "colour", retention=None)


def test_a_pause_is_an_act_with_its_reason(line: Line) -> None:
    found = line.do("pause", "demo", reason="the host is repaired")
    assert (found["act"], found["done"], found["champion"]) == ("paused", True, 1)
    act = line.shell.acts()[-1]
    assert (act.kind, act.reason) == ("paused", "all automatic work: the host is repaired")
    assert act.before == {}
    pause = line.state().paused
    assert pause == Pause.model_validate(act.after["/paused"])
    assert (pause.schedule_only, pause.actor) == (False, act.actor)
    assert pause.reason == "the host is repaired"


def test_status_history_and_show_tell_of_a_pause(line: Line) -> None:
    line.do("pause", "demo", reason="the host is repaired")
    out = line.shell("status").out
    assert "demo is paused since" in out
    assert "the host is repaired" in out
    assert line.shell.json("status")["lines"][0]["paused"]["reason"] == "the host is repaired"
    (act,) = line.shell.json("history", "demo", "--event", "paused")["acts"]
    assert act["reason"] == "all automatic work: the host is repaired"
    line.do("resume", "demo", reason="it is back")
    assert "is paused" not in line.shell("status").out


def test_a_person_who_remerges_a_paused_line_is_told_what_to_do(line: Line) -> None:
    line.do("pause", "demo", reason="the host is repaired")
    before = line.shell.head_bytes()
    for options in ((), ("--force",)):
        done = line.shell("remerge", "demo", *options, code=3)
        assert "line demo is paused" in done.err
        assert "the host is repaired" in done.err
        assert "restitch resume demo" in done.err
    assert line.shell.head_bytes() == before


def test_a_registration_on_a_paused_line_is_recorded_and_nothing_follows(line: Line) -> None:
    line.do("pause", "demo")
    told = line.add("number")
    assert (told["state"], told["merged"], told["paused"]["reason"]) == (
        *("registered", None),
        "because",
    )
    files = ("--task", line.world.task("animal"), "--model", line.world.model("animal"))
    out = line.shell("register", "demo", *files).out
    assert "demo is paused" in out
    assert "restitch resume demo" in out
    assert line.shell.kinds()[-3:] == ["paused", "registered", "registered"]
    assert line.state().champion == 1
    assert line.state().tasks["number"].versions[1].mask is None


def test_waiting_for_a_paused_line_ends_at_once(line: Line) -> None:
    line.do("pause", "demo", reason="the host is repaired")
    files = ("--task", line.world.task("number"), "--model", line.world.model("number"))
    done = line.shell("register", "demo", *files, "--wait", code=6)
    assert "line demo is paused" in done.err
    assert "restitch resume demo" in done.err
    assert line.state().tasks["number"].versions[1].state == "registered"


def test_resuming_merges_what_was_registered_meanwhile(
    line: Line, world: World, shell: Shell, tmp_path: Path
) -> None:
    line.do("pause", "demo")
    line.add("number")
    found = line.do("resume", "demo", reason="done")
    assert (found["act"], found["merged"]["action"]) == ("resumed", "promoted")
    assert line.members() == {"colour": 1, "number": 1}
    never_paused = Line(
        world, Shell(tmp_path / "other"), tmp_path, "colour", "number", retention=None
    )
    assert shell.patch_bytes() == never_paused.shell.patch_bytes()
    line.shell.check_settled()


def test_a_line_can_be_resumed_without_a_remerge(line: Line) -> None:
    line.do("pause", "demo")
    line.add("number")
    line.shell("resume", "demo", "--no-remerge")
    assert line.state().champion == 1
    assert line.state().paused is None


def test_people_still_decide_on_a_paused_line_and_no_remerge_follows(line: Line) -> None:
    line.add("number")
    line.do("pause", "demo")
    found = line.do("retire", "demo", "number")
    assert (found["done"], found["merged"]) == (True, None)
    assert any("restitch resume demo" in note for note in found["notes"])
    assert line.do("rollback", "demo", 1)["champion"] == 1


def test_a_schedule_alone_is_paused_and_the_rest_goes_on(line: Line) -> None:
    found = line.do("pause", "demo", "--schedule-only", reason="too often")
    assert line.shell.acts()[-1].reason == "the schedule: too often"
    assert found["paused"]["schedule_only"]
    assert line.add("number")["merged"]["action"] == "promoted"
    assert "the schedule of demo is paused" in line.shell("status").out
    assert line.do("retire", "demo", "number")["merged"]["action"] == "promoted"


def test_a_pause_grows_and_never_shrinks(line: Line) -> None:
    acts = len(line.shell.acts())
    line.do("pause", "demo", "--schedule-only")
    assert line.do("pause", "demo")["done"]
    assert line.state().is_paused
    for options in ((), ("--schedule-only",)):
        assert not line.do("pause", "demo", *options)["done"]
    assert line.state().is_paused
    assert line.do("resume", "demo")["done"]
    assert not line.do("resume", "demo")["done"]
    assert len(line.shell.acts()) == acts + 3


def test_a_pause_needs_a_reason(line: Line) -> None:
    before = line.shell.head_bytes()
    line.shell("pause", "demo", code=2)
    line.shell("pause", "demo", "--reason", " ", code=3)
    assert line.shell.head_bytes() == before


@pytest.mark.parametrize("step", ["record_version", "promote"])
def test_a_pause_during_a_remerge_stops_it_at_its_next_act(
    line: Line, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    from restitch.flows import remerge

    original = getattr(remerge, step)

    def late(*args: Any) -> Any:
        line.do("pause", "demo", reason="stop")
        monkeypatch.setattr(remerge, step, original)
        return original(*args)

    monkeypatch.setattr(remerge, step, late)
    files = ("--task", line.world.task("number"), "--model", line.world.model("number"))
    done = line.shell("register", "demo", *files, code=3)
    assert "line demo is paused" in done.err
    assert line.shell.kinds()[-1] == "paused"
    assert line.state().champion == 1
    assert line.do("resume", "demo")["merged"]["action"] == "promoted"
    assert line.members() == {"colour": 1, "number": 1}


def test_the_trail_of_a_paused_line_is_intact_and_gives_its_state(line: Line) -> None:
    line.do("pause", "demo", "--schedule-only")
    line.do("pause", "demo")
    paused_at = line.shell.acts()[-1].time
    line.do("resume", "demo")
    assert line.shell.json("verify", "demo")["intact"]
    found = line.shell.json("history", "demo", "--as-of", paused_at)
    assert found["paused"]["schedule_only"] is False
    assert "demo is paused" in line.shell("history", "demo", "--as-of", paused_at).out


def test_a_state_without_a_pause_is_written_without_the_key(line: Line) -> None:
    state = line.state().to_json()
    assert "paused" not in state
    assert LineState.model_validate(state) == line.state()


@pytest.mark.parametrize("act", ["pause", "resume"])
def test_the_line_file_says_who_may_pause(
    world: World, shell: Shell, tmp_path: Path, act: str
) -> None:
    Line(world, shell, tmp_path, "colour", retention=None, actors={act: ["ann"]})
    if act == "resume":
        shell("pause", "demo", "--reason", "x")
    done = Shell(shell.home, {"RESTITCH_ACTOR": "bob"})(act, "demo", "--reason", "x", code=3)
    assert f"bob may not {act} on line demo" in done.err


def test_a_workers_run_on_a_paused_line_ends_without_a_change(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    from restitch.flows import remerge

    line.do("pause", "demo")
    line.add("number")
    before = line.shell.head_bytes()
    monkeypatch.setattr(remerge, "is_workers_run", lambda: True)
    with line.shell.inside():
        assert remerge.remerge("demo").action == "paused"
    assert line.shell.head_bytes() == before


def test_a_paused_schedule_stops_its_own_runs_only(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    from restitch.flows import remerge

    line.add("number", "--no-remerge")
    line.do("pause", "demo", "--schedule-only")
    monkeypatch.setattr(remerge, "is_workers_run", lambda: True)
    monkeypatch.setattr(remerge, "mark_silent_runs", lambda _: None)
    monkeypatch.setattr(remerge, "is_scheduled_run", lambda: True)
    with line.shell.inside():
        assert remerge.remerge("demo").action == "paused"
        monkeypatch.setattr(remerge, "is_scheduled_run", lambda: False)
        assert remerge.remerge("demo").action == "promoted"


def test_an_event_does_not_onboard_on_a_paused_line(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    from restitch.flows.onboard import onboard

    line.do("pause", "demo")
    line.add("number")
    with line.shell.inside():
        outcome = onboard("demo", "number", 1)
    assert (outcome.state, outcome.localized) == ("registered", False)
    attempts = line.shell.ledger().objects.store.list("attempts")
    assert not [name for name in attempts if "number" in name]
