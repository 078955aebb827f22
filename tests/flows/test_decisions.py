"""Decisions of people: each is one act, is done once, and gives the bytes that it must."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from restitch.registry.ledger.line_state import LineState
from tests.conftest import NewHome, Three
from tests.shell import Shell
from tests.worlds import World

pytestmark = pytest.mark.usefixtures("without_mlflow")


class Line:
    """A line with the skills of the text world, one version each."""

    def __init__(self, world: World, shell: Shell, folder: Path, *tasks: str, **spec: Any) -> None:
        self.world, self.shell = world, shell
        shell("init", world.line(folder / f"{shell.home.name}.yaml", **spec))
        for task in tasks:
            self.add(task)

    def add(self, task: str, *options: str, model: str = "", code: int = 0) -> Any:
        return self.shell.add(self.world, task, *options, model=model, code=code)

    def do(self, *words: object, reason: str = "because", code: int = 0) -> Any:
        return self.shell.json(*words, "--reason", reason, code=code)

    def state(self) -> LineState:
        return self.shell.state()

    def members(self) -> dict[str, int]:
        champion = self.state().champion
        assert champion is not None
        record = self.shell.ledger().merged(champion)
        return {task: member.version for task, member in record.members.items()}


@pytest.fixture
def line(world: World, three: Three, shell: Shell, tmp_path: Path) -> Line:
    """A copy of the line with three members, which `init` leaves as it is."""
    shutil.copytree(three.shell.home / "store", shell.home / "store")
    return Line(world, shell, tmp_path)


def test_a_rollback_puts_the_old_version_in_use_and_pins_it(line: Line) -> None:
    found = line.do("rollback", "demo", 2, reason="animal is wrong")
    assert (found["done"], found["before"], found["champion"], found["pinned"]) == (
        True,
        3,
        2,
        True,
    )
    assert (line.state().champion, line.state().pinned) == (2, True)
    act = line.shell.acts()[-1]
    assert (act.kind, act.reason) == (
        "rolled-back",
        "version 2 in place of 3, pinned: animal is wrong",
    )
    assert act.after == {"/champion": 2, "/pinned": True}
    assert act.digests["patch"] == line.shell.ledger().merged(2).patch
    line.shell.check_settled()
    assert line.members() == {"colour": 1, "number": 1}


def test_a_rollback_is_done_once(line: Line) -> None:
    line.do("rollback", "demo", 2)
    acts = len(line.shell.acts())
    assert line.do("rollback", "demo", 2)["done"] is False
    assert len(line.shell.acts()) == acts


def test_a_rollback_to_the_version_in_use_pins_it(line: Line) -> None:
    found = line.do("rollback", "demo", 3, reason="keep it")
    assert (found["done"], found["before"], found["champion"], found["pinned"]) == (
        True,
        3,
        3,
        True,
    )
    act = line.shell.acts()[-1]
    assert (act.kind, act.reason) == ("rolled-back", "version 3 stays in use, pinned: keep it")
    assert act.after == {"/pinned": True}
    line.add("wreck")
    assert (line.state().champion, line.state().candidate) == (3, 4)
    assert line.do("rollback", "demo", 3)["done"] is False
    assert line.do("rollback", "demo", "champion")["done"] is False


def test_a_promotion_of_the_version_in_use_pins_it_if_a_remerge_would_replace_it(
    line: Line,
) -> None:
    assert line.do("promote", "demo", 3)["done"] is False
    line.add("wreck", "--no-remerge")
    found = line.do("promote", "demo", 3)
    assert (found["done"], found["champion"], found["pinned"]) == (True, 3, True)
    line.shell("remerge", "demo")
    assert (line.state().champion, line.state().candidate) == (3, 4)


def test_a_candidate_with_a_retired_task_does_not_wait_any_more(line: Line) -> None:
    line.do("pin", "demo")
    line.add("wreck")
    assert line.state().candidate == 4
    line.do("retire", "demo", "wreck", "--no-remerge")
    assert line.state().candidate is None


def test_after_a_rollback_new_models_become_candidates_until_the_line_is_unpinned(
    line: Line,
) -> None:
    line.do("rollback", "demo", 2)
    line.add("wreck")
    assert (line.state().champion, line.state().candidate) == (2, 4)
    found = line.do("unpin", "demo", reason="looked at it")
    assert found["merged"]["action"] == "promoted"
    assert (line.state().champion, line.state().candidate, line.state().pinned) == (4, None, False)
    assert line.shell.kinds()[-2:] == ["unpinned", "promoted"]
    line.shell.check_settled()


def test_only_a_former_champion_can_be_rolled_back_to(line: Line) -> None:
    line.do("pin", "demo")
    line.add("wreck")
    done = line.shell("rollback", "demo", 4, "--reason", "x", code=3)
    assert "was never the champion" in done.err
    assert "restitch promote demo 4" in done.err.replace("\n", " ")
    done = line.shell("rollback", "demo", 9, "--reason", "x", code=3)
    assert "no version 9" in done.err
    assert line.state().champion == 3


def test_a_rollback_can_be_rolled_back(line: Line) -> None:
    line.do("rollback", "demo", 1)
    line.do("rollback", "demo", 3)
    assert line.state().champion == 3


def test_a_promotion_past_a_gate_says_so_and_stays(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    line = Line(world, shell, tmp_path, "colour", gates={"min_retention": 0.25})
    line.add("wreck", code=5)
    assert line.state().tasks["wreck"].versions[1].state == "held"
    found = line.do("promote", "demo", 2, reason="we need it")
    assert (found["done"], found["champion"], found["pinned"]) == (True, 2, False)
    act = line.shell.acts()[-1]
    assert act.kind == "promoted"
    assert act.reason.startswith("version 2 by hand, past min_retention of the general benchmark")
    assert act.reason.endswith("< 0.25: we need it")
    assert line.state().tasks["wreck"].versions[1].state == "ready"
    line.shell.check_settled()
    assert line.members() == {"colour": 1, "wreck": 1}


def test_a_promotion_that_a_remerge_would_undo_pins_the_line(line: Line) -> None:
    found = line.do("promote", "demo", 1)
    assert found["pinned"]
    assert "would have replaced" in found["notes"][0]
    line.shell.check_settled()
    assert line.members() == {"colour": 1}


def test_a_candidate_is_promoted_and_the_line_stays_pinned(line: Line) -> None:
    line.do("pin", "demo", reason="freeze")
    line.add("wreck")
    assert line.state().candidate == 4
    assert line.do("promote", "demo", "candidate")["champion"] == 4
    assert (line.state().candidate, line.state().pinned) == (None, True)


def test_after_a_retirement_the_bytes_are_those_without_the_model(
    line: Line, new_home: NewHome, tmp_path: Path
) -> None:
    found = line.do("retire", "demo", "number", reason="its data was withdrawn")
    assert found["merged"]["action"] == "promoted"
    assert line.members() == {"animal": 1, "colour": 1}
    never = Line(line.world, new_home("never"), tmp_path, "colour", "animal")
    assert line.shell.patch_bytes() == never.shell.patch_bytes()
    records = [one.ledger().merged(one.state().champion or 0) for one in (line.shell, never.shell)]
    assert records[0].recipe == records[1].recipe
    act = next(act for act in line.shell.acts() if act.kind == "retired")
    assert act.reason == "number: its data was withdrawn"
    model = line.state().tasks["number"].versions[1]
    assert (model.state, model.reason) == ("retired", "its data was withdrawn")
    line.shell.check_settled()


def test_restoring_brings_back_the_same_bytes(line: Line) -> None:
    before = line.shell.patch_bytes()
    state = line.state().tasks["number"].versions[1]
    line.do("retire", "demo", "number")
    assert line.shell.patch_bytes() != before
    line.do("restore", "demo", "number", reason="a mistake")
    assert line.shell.patch_bytes() == before
    assert line.state().tasks["number"].versions[1] == state
    assert line.do("restore", "demo", "number")["done"] is False
    assert line.do("retire", "demo", "number")["done"] is True


def test_a_held_model_is_restored_as_held(world: World, shell: Shell, tmp_path: Path) -> None:
    line = Line(world, shell, tmp_path, "colour", gates={"min_retention": 0.25})
    line.add("wreck", code=5)
    reason = line.state().tasks["wreck"].versions[1].reason
    line.do("retire", "demo", "wreck")
    line.do("restore", "demo", "wreck")
    model = line.state().tasks["wreck"].versions[1]
    assert (model.state, model.reason) == ("held", reason)


def test_a_line_without_members_has_no_champion(world: World, shell: Shell, tmp_path: Path) -> None:
    line = Line(world, shell, tmp_path, "colour")
    found = line.do("retire", "demo", "colour")
    assert (found["champion"], found["merged"]["action"]) == (None, "empty")
    assert line.state().champion is None
    assert line.shell.json("status", "demo")["lines"][0]["champion"] is None
    assert line.do("restore", "demo", "colour")["champion"] is not None


def test_a_pinned_line_keeps_its_champion_when_its_model_is_retired(line: Line) -> None:
    line.do("pin", "demo")
    for task in ("colour", "number", "animal"):
        line.do("retire", "demo", task)
    assert line.state().champion == 3
    assert line.do("rollback", "demo", 2)["notes"] == [
        "version 2 holds colour 1, number 1, retired since"
    ]


def test_a_model_that_is_registered_after_a_retirement_joins(line: Line) -> None:
    line.do("retire", "demo", "colour")
    line.add("colour", model="colour-2")
    assert line.members()["colour"] == 2
    assert line.state().tasks["colour"].versions[1].state == "retired"


def test_a_model_that_is_retired_while_it_waits_to_be_localized_does_not_join(line: Line) -> None:
    with line.shell.inside():
        line.shell.ledger().act(
            "registered",
            "test",
            "again",
            lambda line_state: line_state.with_state("colour", 1, "registered"),
        )
    line.do("retire", "demo", "colour")
    assert line.state().tasks["colour"].versions[1].state == "retired"
    assert line.members() == {"animal": 1, "number": 1}


def test_a_retirement_during_a_remerge_is_not_lost(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No version that is made after a retirement holds what was retired."""
    from restitch.flows.promotion.transitions import record_version

    def late(*args: Any) -> Any:
        line.do("retire", "demo", "number", "--no-remerge")
        monkeypatch.setattr("restitch.flows.remerge.record_version", record_version)
        return record_version(*args)

    monkeypatch.setattr("restitch.flows.remerge.record_version", late)
    line.add("wreck")
    kinds = line.shell.kinds()
    after = line.shell.acts()[kinds.index("retired") :]
    made = [int(p.rpartition("/")[2]) for a in after for p in a.after if p.startswith("/versions/")]
    assert made
    for version in made:
        assert "number" not in line.shell.ledger().merged(version).members
    assert line.members() == {"animal": 1, "colour": 1, "wreck": 1}


@pytest.mark.parametrize(
    "words",
    [
        ("rollback", "demo", 2),
        ("promote", "demo", 2),
        ("retire", "demo", "colour"),
    ],
)
def test_a_decision_needs_a_reason(line: Line, words: tuple[object, ...]) -> None:
    before = line.shell.head_bytes()
    line.shell(*words, code=2)
    done = line.shell(*words, "--reason", "  ", code=3)
    assert "reason" in done.err
    assert line.shell.head_bytes() == before


def test_pinning_and_restoring_need_no_reason(line: Line) -> None:
    line.do("retire", "demo", "number", "--no-remerge")
    line.shell("restore", "demo", "number")
    line.shell("pin", "demo")
    line.shell("unpin", "demo")
    reasons = [act.reason for act in line.shell.acts()[-3:]]
    assert reasons == [
        "number",
        "version 3 stays the champion",
        "versions are promoted automatically again",
    ]


def test_an_unknown_task_is_named_with_the_known_ones(line: Line) -> None:
    for word in ("retire", "restore"):
        done = line.shell(word, "demo", "colur", "--reason", "x", code=3)
        assert "no task colur" in done.err
        assert "animal, colour, number" in done.err
