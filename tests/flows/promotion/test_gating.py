"""Gates of a line: which models are held, what is promoted, and when a model is tried again."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from restitch.flows import remerge as remerging
from restitch.flows.onboard import onboard
from restitch.registry.ledger.finetuned_models import ModelKey
from restitch.registry.ledger.ledger import Ledger
from tests.conftest import NewHome
from tests.shell import Shell
from tests.worlds import World, write_rows, write_yaml

pytestmark = pytest.mark.usefixtures("without_mlflow")


class Gated:
    """A line whose gates can be changed.

    With the models of the text world: the skills together keep about 0.4 of the base's
    accuracy on the benchmark, with the wreck it is about 0.1.
    """

    def __init__(self, world: World, shell: Shell, folder: Path) -> None:
        self.world, self.shell, self.file = world, shell, folder / "line.yaml"

    def configure(self, **gates: Any) -> Any:
        return self.shell.json("init", self.world.line(self.file, gates=gates))

    def add(self, task: str, *options: str, model: str = "", code: int = 0) -> Any:
        return self.shell.add(self.world, task, *options, model=model, code=code)

    def remerge(self, code: int = 0) -> Any:
        return self.shell.json("remerge", "demo", code=code)

    def state(self, task: str, version: int = 1) -> str:
        return self.shell.state().tasks[task].versions[version].state

    def members(self) -> dict[str, int]:
        """The champion's members."""
        champion = self.shell.state().champion
        if champion is None:
            return {}
        record = self.shell.ledger().merged(champion)
        return {task: member.version for task, member in record.members.items()}


@pytest.fixture
def line(world: World, shell: Shell, tmp_path: Path) -> Gated:
    return Gated(world, shell, tmp_path)


def test_a_joining_that_fails_is_held_with_the_values_that_decided(line: Gated) -> None:
    line.configure(min_retention=0.25)
    line.add("colour")
    found = line.add("wreck", code=5)
    assert found["state"] == "held"
    assert found["reason"].startswith("min_retention of the general benchmark: 0.")
    assert found["reason"].endswith("< 0.25")
    assert found["merged"]["action"] == "rejected"
    assert found["merged"]["held"] == {"wreck 1": [found["reason"]]}
    line_state = line.shell.state()
    assert (line_state.champion, line_state.candidate, line_state.newest) == (1, None, 2)
    assert line.members() == {"colour": 1}
    assert line.shell.kinds()[-3:] == ["merged", "rejected", "held"]
    (rejected,) = [act for act in line.shell.acts() if act.kind == "rejected"]
    assert found["reason"] in rejected.reason
    shown = line.shell.json("show", "demo", 2)
    assert (shown["role"], shown["verdict"]) == (None, "failed")
    (gate,) = shown["gates"]
    assert (gate["gate"], gate["limit"], gate["passed"]) == ("min_retention", 0.25, False)
    assert gate["value"] == shown["retention"]["ratio"]
    assert found["reason"] in line.shell("status", "demo").out.replace("\n", " ")


def test_a_held_model_is_left_alone_until_something_changes(line: Gated) -> None:
    line.configure(min_retention=0.25)
    line.add("colour")
    line.add("wreck", code=5)
    before = line.shell.head_bytes()
    found = line.remerge()
    assert (found["action"], found["version"]) == ("unchanged", 1)
    assert line.shell.head_bytes() == before
    assert line.add("wreck", code=5)["state"] == "held", "again: it is held as before"
    assert line.shell.head_bytes() == before


def test_the_rest_is_promoted_without_the_one_that_fails(line: Gated) -> None:
    line.configure(min_retention=0.25)
    line.add("colour")
    for task in ("wreck", "number", "animal"):
        line.add(task, "--no-remerge")
    found = line.remerge(code=5)
    assert found["action"] == "promoted"
    assert list(found["held"]) == ["wreck 1"]
    assert line.members() == {"animal": 1, "colour": 1, "number": 1}
    assert {t: line.state(t) for t in ("wreck", "number", "animal", "colour")} == {
        "wreck": "held",
        "number": "ready",
        "animal": "ready",
        "colour": "ready",
    }
    line_state = line.shell.state()
    assert (line_state.champion, line_state.candidate) == (3, None), (
        "what it left behind is no candidate"
    )
    line.shell.check_settled()


@pytest.mark.parametrize(("first", "second"), [("number", "animal"), ("animal", "number")])
def test_of_two_models_that_only_pass_alone_the_older_one_stays(
    line: Gated, first: str, second: str
) -> None:
    line.configure(min_retention=0.38)  # what each keeps alone, and both together do not
    line.add(first, "--no-remerge")
    line.add(second, "--no-remerge")
    found = line.remerge(code=5)
    assert list(found["held"]) == [f"{second} 1"]
    assert line.members() == {first: 1}
    line.shell.check_settled()


def test_a_first_model_that_fails_leaves_no_champion(line: Gated) -> None:
    line.configure(min_retention=0.25)
    found = line.add("wreck", code=5)
    assert found["state"] == "held"
    line_state = line.shell.state()
    assert (line_state.champion, line_state.candidate) == (None, None)
    assert line.remerge()["action"] == "empty"
    line.shell.check_settled()
    line.shell("export", "demo", "champion", line.file.parent / "out", code=3)
    line.shell("export", "demo", "candidate", line.file.parent / "out", code=3)
    line.shell("export", "demo", 1, line.file.parent / "out")
    line.add("colour", code=0)
    assert line.members() == {"colour": 1}


def test_a_lower_gate_lets_a_held_model_in(line: Gated) -> None:
    line.configure(min_retention=0.25)
    line.add("colour")
    line.add("wreck", code=5)
    line.configure(min_retention=0.01)
    found = line.remerge()
    assert found["action"] == "promoted"
    assert line.members() == {"colour": 1, "wreck": 1}
    assert line.state("wreck") == "ready"
    line_state = line.shell.state()
    assert (line_state.champion, line_state.candidate) == (3, None)
    assert line.shell.patch_bytes(3) == line.shell.patch_bytes(2)
    verdicts = {v: line.shell.ledger().merged(v).verdict for v in (2, 3)}
    assert verdicts == {2: "failed", 3: "passed"}, "a champion's record shows that it passed"
    line.shell.check_settled()


@pytest.mark.parametrize("fails", [False, True])
def test_workers_also_make_the_new_masks_of_held_models_before_one_merge(
    line: Gated, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Unless its run has failed: a held model must not keep the others from their merge."""
    line.configure(min_retention=0.25)
    line.add("colour")
    line.add("wreck", code=5)
    line.shell("init", line.world.line(line.file, localize={"density": 0.1}))
    started: set[str] = set()

    def start(_: Ledger, key: ModelKey) -> str:
        under_way = key.task in started and not fails
        started.add(key.task)
        return remerging._AT_WORK if under_way else remerging._STARTED

    monkeypatch.setattr(remerging, "has_workers", lambda: True)
    monkeypatch.setattr(remerging, "_start_onboard", start)
    acts = len(line.shell.kinds())
    assert list(line.remerge()["missing"]) == ["colour 1"]
    assert started == {"colour", "wreck"}
    with line.shell.inside():
        onboard("demo", "colour", 1)
    found = line.remerge()
    if fails:
        assert (found["action"], line.members()) == ("promoted", {"colour": 1})
    else:
        assert (found["action"], list(found["missing"])) == ("waiting", ["wreck 1"])
        with line.shell.inside():
            onboard("demo", "wreck", 1)
        assert line.remerge()["action"] == "promoted"
        assert line.shell.kinds()[acts:] == [*["localized"] * 2, "merged", "promoted"]
        assert line.members() == {"colour": 1, "wreck": 1}


def test_a_higher_gate_does_not_take_the_champion_away(line: Gated) -> None:
    line.configure()
    line.add("colour")
    line.configure(min_retention=0.99)
    assert line.remerge()["action"] == "unchanged"
    assert line.shell.state().champion == 1


def test_a_held_model_is_tried_again_when_a_member_comes(line: Gated) -> None:
    line.configure(min_retention=0.25)
    line.add("colour")
    line.add("wreck", code=5)
    line.add("number")
    held = [act for act in line.shell.acts() if act.kind == "held"]
    assert len(held) == 2
    assert line.members() == {"colour": 1, "number": 1}
    assert line.state("wreck") == "held"
    line.shell.check_settled()


def test_a_held_model_is_tried_again_when_its_data_changes(line: Gated, tmp_path: Path) -> None:
    """A task that the model solves less well than its rows said at first."""
    line.configure(min_normalized=0.9)
    found = line.add("colour", code=5)
    assert found["state"] == "held"
    assert "min_normalized of colour" in found["reason"]
    line.shell.check_settled()
    shown = line.shell.json("show", "demo", "1")["results"]["colour"]["merged"]
    assert shown < 0.9
    # Rows that the merged model gets right.
    data = line.world.root / "data" / "colour" / "test.jsonl"
    rows = [json.loads(text) for text in data.read_text().splitlines()]
    right = [row for row in rows if row["label"] == "green"]
    write_rows(tmp_path / "new" / "test.jsonl", right)
    file = write_yaml(
        tmp_path / "colour.yaml",
        {
            "task": "colour",
            "data": {"path": "new", "test": "test.jsonl", "input": "text", "label": "label"},
            "head": {"labels": ["red", "green", "blue"], "templates": ["{}", "it is {}"]},
        },
    )
    files = ("--task", file, "--model", line.world.model("colour"))
    before = len(line.shell.kinds())
    line.shell.json("register", "demo", *files, "--replace-task", code=None)
    assert "merged" in line.shell.kinds()[before:]
    line.shell.check_settled()


def test_a_drop_is_measured_against_the_champion(line: Gated) -> None:
    line.configure(max_task_drop=0.2)
    line.add("colour")
    found = line.add("wreck", code=5)
    assert found["reason"].startswith("max_task_drop of colour: 0.")
    assert " > 0.2 (p = " in found["reason"]
    assert line.members() == {"colour": 1}


def test_a_replacement_that_fails_keeps_the_member(line: Gated) -> None:
    line.configure(min_retention=0.25)
    line.add("colour")
    line.add("number")
    before = line.shell.patch_bytes()
    admitted = ("--accept-no-gain", "--reason", "so that only the gate decides")
    found = line.add("colour", *admitted, model="wreck", code=5)
    assert (found["version"], found["state"]) == (2, "held")
    assert line.state("colour", 1) == "ready"
    assert line.members() == {"colour": 1, "number": 1}
    assert line.shell.patch_bytes() == before
    line.shell.check_settled()
    line.configure(min_retention=0.01)
    line.remerge()
    assert line.members() == {"colour": 2, "number": 1}
    assert (line.state("colour", 1), line.state("colour", 2)) == ("replaced", "ready")


def test_a_held_model_leaves_no_trace_in_the_champion(
    line: Gated, world: World, new_home: NewHome, tmp_path: Path
) -> None:
    line.configure(min_retention=0.25)
    other = new_home("other")
    other("init", world.line(tmp_path / "other.yaml"))
    line.add("colour")
    line.add("wreck", code=5)
    for task in ("number", "animal"):
        line.add(task)
    for task in ("animal", "number", "colour"):
        other.add(world, task)
    assert line.shell.patch_bytes() == other.patch_bytes()


def test_a_rejected_version_stays_in_the_history(line: Gated) -> None:
    line.configure(min_retention=0.25)
    line.add("colour")
    line.add("wreck", code=5)
    line.add("number")
    versions = line.shell.json("history", "demo", "--versions")["versions"]
    assert [(v["version"], v["passed"]) for v in versions] == [
        (4, True),
        (3, False),
        (2, False),
        (1, True),
    ]
    assert versions[1]["failed"][0].startswith("min_retention")
    assert "failed" in line.shell("history", "demo", "--versions").out


def test_a_pinned_line_makes_candidates(line: Gated) -> None:
    line.configure()
    line.add("colour")
    line.shell.ledger().act(
        "configured", "tester", "pin", lambda line_state: line_state.with_pin(True)
    )
    found = line.add("number")
    assert found["merged"]["action"] == "candidate"
    line_state = line.shell.state()
    assert (line_state.champion, line_state.candidate) == (1, 2)
    line.shell.check_settled()
    line.shell.ledger().act(
        "configured", "tester", "unpin", lambda line_state: line_state.with_pin(False)
    )
    assert line.remerge()["action"] == "promoted"
    assert line.shell.state().champion == 2


def test_a_gate_that_only_warns_does_not_block_promotion(line: Gated) -> None:
    line.configure(min_retention=0.25, warn=["min_retention"])
    line.add("colour")
    line.add("wreck")
    assert line.members() == {"colour": 1, "wreck": 1}
    shown = line.shell.json("show", "demo")
    (gate,) = shown["gates"]
    assert (gate["passed"], gate["action"]) == (False, "warn")
    assert gate["note"].endswith("< 0.25 (a warning)")
    (act,) = [act for act in line.shell.acts() if act.kind == "promoted"][1:]
    assert gate["note"] in act.reason
    line.shell.check_settled()


def test_a_patch_over_its_size_is_not_promoted_and_what_fits_is(line: Gated) -> None:
    line.configure()
    line.add("colour")
    size = line.shell.json("show", "demo")["patch_bytes"]
    line.configure(max_patch_bytes=size + 100)
    found = line.add("number", code=5)
    assert found["reason"].startswith("max_patch_bytes of the patch: ")
    assert line.members() == {"colour": 1}
    line.configure(max_patch_bytes=f"{3 * size}B")
    line.remerge()
    assert line.members() == {"colour": 1, "number": 1}


def test_a_drop_that_can_be_chance_passes_and_says_so(line: Gated) -> None:
    line.configure(max_task_drop=0.0)
    line.add("colour")
    line.add("animal")
    gates = line.shell.json("show", "demo", 2)["gates"]
    (noise,) = [gate for gate in gates if gate["task"] == "colour"]
    assert noise["value"] > 0
    assert noise["interval"]["low"] < 0 < noise["interval"]["high"]
    assert noise["passed"]
    assert ", within noise (p = 0." in noise["note"]
    assert line.members() == {"animal": 1, "colour": 1}


def without_data(line: Gated, task: str) -> Path:
    """The file of a task without data, in another folder."""
    file = line.file.parent / "bare" / f"{task}.yaml"
    return write_yaml(file, {"task": task})


@pytest.mark.parametrize("gates", [{"min_normalized": 0.1}, {"max_task_drop": 0.5}])
def test_a_task_without_data_is_held_until_it_has_data(
    line: Gated, gates: dict[str, float]
) -> None:
    line.configure(**gates)
    files = ("--task", without_data(line, "colour"), "--model", line.world.model("colour"))
    found = line.shell.json("register", "demo", *files, code=5)
    (name,) = gates
    note = f"{name} of colour: not measured, because the task has no rows to evaluate on"
    assert (found["state"], found["reason"]) == ("held", note)
    (rejected,) = [act for act in line.shell.acts() if act.kind == "rejected"]
    assert note in rejected.reason
    (version,) = line.shell.json("history", "demo", "--versions")["versions"]
    assert (version["verdict"], version["failed"]) == ("not measured", [note])
    assert f"not measured: {note}" in line.shell("show", "demo", 1).out
    assert line.shell.state().champion is None
    line.shell.check_settled()
    found = line.add("colour", "--replace-task")
    assert found["merged"]["action"] == "promoted"
    assert line.members() == {"colour": found["version"]}


def test_a_member_without_data_blocks_a_gate_that_is_set_later(line: Gated) -> None:
    line.configure()
    files = ("--task", without_data(line, "colour"), "--model", line.world.model("colour"))
    line.shell.json("register", "demo", *files)
    promoted = [act.reason for act in line.shell.acts() if act.kind == "promoted"]
    assert promoted == ["version 1: no gates"]
    line.configure(max_task_drop=0.5)
    found = line.add("number", code=5)
    assert found["reason"].startswith("max_task_drop of colour: not measured, because")
    assert line.members() == {"colour": 1}
    line.shell.check_settled()


def test_a_drop_is_measured_on_the_rows_of_now(line: Gated) -> None:
    """The champion is evaluated on rows that came after it was made."""
    line.configure()
    files = ("--task", without_data(line, "colour"), "--model", line.world.model("colour"))
    line.shell.json("register", "demo", *files)
    line.shell("task", "demo", "--task", line.world.task("colour"), "--replace-task")
    line.configure(max_task_drop=0.2)
    found = line.add("wreck", code=5)
    assert found["reason"].startswith("max_task_drop of colour: 0.")
    assert " > 0.2 (p = " in found["reason"]


def test_a_task_that_comes_back_is_compared_with_the_champion(line: Gated) -> None:
    line.configure(max_task_drop=0.2)
    line.add("colour")
    line.add("number")
    line.shell("pin", "demo")
    line.shell("retire", "demo", "colour", "--no-remerge", "--reason", "a new model comes")
    admitted = ("--accept-no-gain", "--reason", "so that only the gate decides")
    found = line.add("colour", *admitted, model="wreck", code=5)
    assert found["reason"].startswith("max_task_drop of colour: 0.")


def test_without_gates_a_significant_drop_is_promoted_with_a_warning(line: Gated) -> None:
    line.configure()
    line.add("colour")
    found = line.add("wreck")
    (warning,) = found["merged"]["warnings"]
    assert re.fullmatch(r"colour lost 0\.\d{4} against version 1 \(p = .*\)", warning)
    assert line.shell.acts()[-1].reason == f"version 2: no gates; {warning}"
    record = line.shell.ledger().merged(2)
    assert record.losses == (warning,)
    assert (record.verdict, record.drops["colour"].against) == ("none", 1)
    old = line.shell.ledger().merged(1).results["colour"].merged
    new = record.results["colour"].merged
    assert old is not None
    assert new is not None
    assert record.drops["colour"].value == old - new
    shown = line.shell("show", "demo").out
    assert "no gates" in shown
    assert warning in shown


def test_the_warning_of_a_drop_is_printed(line: Gated) -> None:
    line.configure()
    line.add("colour")
    line.add("wreck", "--no-remerge")
    done = line.shell("remerge", "demo")
    assert "colour lost 0." in done.out
    assert "demo version 2: colour lost 0." in done.err


def test_a_gate_that_allows_a_drop_needs_no_warning(line: Gated) -> None:
    line.configure(max_task_drop=1)
    line.add("colour")
    assert line.add("wreck")["merged"]["warnings"] == []
    assert "max_task_drop of colour: 0." in line.shell.acts()[-1].reason


def test_a_pinned_line_keeps_the_candidate_that_passed(line: Gated) -> None:
    line.configure(min_retention=0.25)
    line.add("colour")
    line.shell("pin", "demo")
    line.add("number")
    assert line.shell.state().candidate == 2
    line.add("wreck", code=5)
    line_state = line.shell.state()
    assert (line_state.champion, line_state.candidate, line_state.newest) == (1, 2, 3)
    line.shell.check_settled()
    line.shell("unpin", "demo")
    line_state = line.shell.state()
    assert (line_state.champion, line_state.candidate, line_state.newest) == (2, None, 3)
    line.shell.check_settled()


def test_a_candidate_that_fails_stricter_gates_is_none_any_more(line: Gated) -> None:
    line.configure(min_retention=0.01)
    line.add("colour")
    line.shell("pin", "demo")
    line.add("wreck")
    assert line.shell.state().candidate == 2
    line.configure(min_retention=0.25)
    found = line.shell.json("unpin", "demo", code=5)
    assert found["merged"]["held"].keys() == {"wreck 1"}
    line_state = line.shell.state()
    assert (line_state.champion, line_state.candidate, line_state.newest) == (1, None, 3)
    line.shell.check_settled()


@pytest.mark.parametrize(
    "change",
    [{"localize": {"density": 0.001}}, {"method": {"name": "averaging"}, "localize": None}],
)
def test_all_gates_apply_to_all_members_if_masks_or_method_change(
    line: Gated, change: dict[str, Any]
) -> None:
    for task in ("colour", "number"):
        line.configure()
        line.add(task)
    normalized = line.shell.json("show", "demo")["results"]["number"]["normalized"]
    line.configure(min_normalized=round(normalized - 0.001, 4))
    assert line.remerge()["action"] == "unchanged"
    file = line.world.line(line.file, gates={"min_normalized": 0.95}, **change)
    line.shell("init", file)
    found = line.remerge(code=5)
    assert (found["action"], found["champion"], found["held"]) == ("rejected", 2, {})
    checked = {gate["task"] for gate in line.shell.json("show", "demo", 3)["gates"]}
    assert checked == {"colour", "number"}
    assert {line.state(task) for task in ("colour", "number")} == {"ready"}
    before = line.shell.head_bytes()
    found = line.remerge()
    assert (found["action"], found["version"]) == ("unchanged", 2)
    assert line.shell.head_bytes() == before
    assert line.shell.kinds()[-2:] == ["merged", "rejected"]
    # A new member is not held for what the settings did.
    found = line.add("animal", code=5)
    assert (found["state"], found["merged"]["action"]) == ("ready", "rejected")
    assert line.members() == {"colour": 1, "number": 1}
    line.shell.check_settled()


def test_a_benchmark_that_scores_nothing_measures_no_retention(line: Gated, tmp_path: Path) -> None:
    general = _yaml(line.world.task("general"))
    file = Path(general["data"]["path"]) / "test.jsonl"
    rows = [json.loads(text) for text in file.read_text().splitlines()]
    labels = general["head"]["labels"]
    wrong = [{**row, "label": labels[labels.index(row["label"]) - 1]} for row in rows]
    write_rows(tmp_path / "wrong" / "test.jsonl", wrong)
    general["data"]["path"] = str(tmp_path / "wrong")
    line.shell("init", line.world.line(line.file, retention=general, gates={"min_retention": 0.5}))
    found = line.add("colour", code=5)
    assert found["reason"].endswith("not measured, because the base's accuracy on general is 0")


def test_a_benchmark_that_is_a_task_of_the_line_may_come_later(line: Gated) -> None:
    line.shell(
        "init", line.world.line(line.file, retention="general", gates={"min_retention": 0.01})
    )
    found = line.add("colour", code=5)
    assert found["reason"].endswith("not measured, because the line has no general")
    line.shell("task", "demo", "--task", line.world.task("general"))
    assert line.remerge()["action"] == "promoted"


@pytest.mark.parametrize("warn", [[], ["min_retention"]])
@pytest.mark.parametrize("retention", [None, {"task": "general"}])
def test_a_gate_that_can_never_be_measured_is_refused(
    line: Gated, retention: dict[str, str] | None, warn: list[str]
) -> None:
    gates = {"min_retention": 0.5, "warn": warn}
    file = line.world.line(line.file, retention=retention, gates=gates)
    done = line.shell("init", file, code=3)
    assert "min_retention can never be measured" in done.err
    assert line.shell.head_bytes() is None


def test_a_benchmark_cannot_leave_a_gate_behind(line: Gated) -> None:
    line.configure(min_retention=0.5)
    before = line.shell.head_bytes()
    file = line.world.line(line.file, retention=None, gates={"min_retention": 0.5})
    assert "can never be measured" in line.shell("init", file, code=3).err
    assert line.shell.head_bytes() == before


def test_a_percentage_is_refused_with_the_fraction_to_write(line: Gated) -> None:
    for gates in ({"min_retention": 95}, {"min_normalized": 90}, {"max_task_drop": 2}):
        ((name, value),) = gates.items()
        done = line.shell("init", line.world.line(line.file, gates=gates), code=3)
        assert f"gates.{name}: expected a fraction from 0 to 1, found {value}" in done.err
        assert f"write {value / 100:g}, not {value}" in done.err
    assert line.shell.head_bytes() is None


def test_retention_may_be_measured_on_a_fixed_sample(line: Gated) -> None:
    general = _yaml(line.world.task("general"))
    general["data"]["sample"] = 24
    line.shell("init", line.world.line(line.file, retention=general))
    line.add("colour")
    first = line.shell.json("show", "demo")["retention"]
    assert first["count"] == 24
    assert first["interval"]["low"] < first["value"] < first["interval"]["high"]
    general["data"]["sample"] = {"rows": 24, "seed": 5}
    line.shell("init", line.world.line(line.file, retention=general))
    other = line.shell.json("evaluate", "demo")["retention"]
    assert other["count"] == 24
    assert other["data"]["digest"] != first["data"]["digest"]
    assert other["evaluations"] != first["evaluations"]


def _yaml(file: Path) -> Any:
    return yaml.safe_load(file.read_text(encoding="utf-8"))
