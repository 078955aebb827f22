"""A finetuned model must be better than the base on its own task, or a person accepts it."""

from pathlib import Path
from typing import Any

import pytest

from restitch.deployments.local.doctor import examine
from restitch.flows.onboard import onboard
from restitch.registry.ledger.finetuned_models import NO_GAIN
from tests.conftest import NewHome
from tests.shell import Shell
from tests.tiny_models import tweaked
from tests.worlds import BLOCKS, World, described, turned, write_yaml

pytestmark = pytest.mark.usefixtures("without_mlflow")

ACCEPT = ("--accept-no-gain", "--reason", "the labels of this data set are noise")
CAUSES = ("label order", "templates", "texts", "head", "tokenizer")


@pytest.fixture
def line(world: World, shell: Shell, tmp_path: Path) -> Shell:
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    return shell


def register(
    shell: Shell, world: World, task: Path, *options: str, model: str = "colour", code: int = 0
) -> Any:
    files = ("--task", task, "--model", world.model(model))
    return shell.json("register", "demo", *files, *options, code=code)


def flat(text: str) -> str:
    return " ".join(text.split())


def test_a_model_that_is_worse_than_the_base_is_held_with_values_and_causes(
    line: Shell, world: World, tmp_path: Path
) -> None:
    task = turned(world, tmp_path)
    done = line("register", "demo", "--task", task, "--model", world.model("colour"), code=5)
    model = line.state().tasks["colour"].versions[1]
    assert model.state == "held"
    gain, results = model.facts.gain, model.facts.results
    assert gain is not None
    assert gain.verdict == "worse"
    assert gain.interval.low < gain.difference < gain.interval.high < 0
    reason = str(model.reason)
    for result in (results["base"], results["finetuned"]):
        assert f"{result.value:.3f}" in reason
    assert all(cause in reason for cause in CAUSES)
    assert "--accept-no-gain" in reason
    assert flat(reason) in flat(done.out)
    assert done.out.count("p = ") == 1, "the comparison is printed once"
    assert "significantly worse than the base" in done.err
    assert (line.state().champion, line.state().newest) == (None, None)
    assert line.kinds() == ["configured", "registered", "held"]
    act = line.acts()[-1]
    assert (act.digests["mask"], act.digests["delta"]) == (model.mask, model.delta)
    assert f"{results['finetuned'].value:.3f}" in act.reason
    shown = line("status", "demo").out
    assert "(worse)" in shown
    assert "label order" in shown
    line.check_settled()


def test_what_is_held_for_its_gain_is_not_tried_again_by_a_change_elsewhere(
    line: Shell, world: World, new_home: NewHome, tmp_path: Path
) -> None:
    register(line, world, turned(world, tmp_path), code=5)
    for task in ("number", "animal"):
        line.add(world, task)
    line("init", world.line(tmp_path / "line.yaml", retention=None, gates={"max_task_drop": 0.9}))
    line("remerge", "demo")
    assert line.kinds().count("held") == 1
    assert "rejected" not in line.kinds()
    other = new_home("other")
    other("init", world.line(tmp_path / "line.yaml", retention=None))
    for task in ("number", "animal"):
        other.add(world, task)
    assert line.patch_bytes() == other.patch_bytes()
    line.check_settled()


def test_a_held_replacement_leaves_the_member_in_place(
    line: Shell, world: World, tmp_path: Path
) -> None:
    line.add(world, "colour")
    before = line.patch_bytes()
    found = register(line, world, world.task("colour"), model="wreck", code=5)
    assert (found["version"], found["state"]) == (2, "held")
    assert line.state().tasks["colour"].versions[1].state == "ready"
    assert line.patch_bytes() == before
    line.check_settled()


def test_a_corrected_description_releases_the_model(
    line: Shell, world: World, tmp_path: Path
) -> None:
    register(line, world, turned(world, tmp_path), code=5)
    line("task", "demo", "--task", world.task("colour"), "--replace-task")
    found = line.json("remerge", "demo")
    assert (found["action"], found["localized"]) == ("promoted", [])
    model = line.state().tasks["colour"].versions[1]
    assert (model.state, model.reason) == ("ready", None)
    assert model.facts.gain is not None
    assert model.facts.gain.verdict == "better"
    assert line.kinds()[-4:] == ["configured", "measured", "merged", "promoted"]
    assert found["record"]["results"]["colour"]["normalized"] is not None
    line.check_settled()


def test_a_description_that_is_still_wrong_keeps_the_model_held(
    line: Shell, world: World, tmp_path: Path
) -> None:
    register(line, world, turned(world, tmp_path), code=5)
    other = turned(world, tmp_path, max_length=40)
    line("task", "demo", "--task", other, "--replace-task")
    assert line.json("remerge", "demo")["action"] == "empty"
    assert line.state().tasks["colour"].versions[1].state == "held"
    assert line.kinds()[-2:] == ["configured", "measured"]
    bare = write_yaml(tmp_path / "bare.yaml", {"task": "colour"})
    line("task", "demo", "--task", bare, "--replace-task")
    line("remerge", "demo")
    assert line.state().tasks["colour"].versions[1].state == "held", "nothing new was measured"
    line.check_settled()


@pytest.mark.parametrize("when", ["at first", "later"])
def test_a_person_admits_a_model_and_the_trail_keeps_why(
    line: Shell, world: World, tmp_path: Path, when: str
) -> None:
    line("init", world.line(tmp_path / "line.yaml", retention=None, gates={"min_normalized": 0.1}))
    task = turned(world, tmp_path)
    if when == "later":
        register(line, world, task, code=5)
    done = register(line, world, task, *ACCEPT)
    assert (done["version"], done["state"], done["champion"]) == (1, "ready", 1)
    acceptance = line.state().tasks["colour"].versions[1].facts.accepted[NO_GAIN]
    assert acceptance.reason == ACCEPT[-1]
    (act,) = [act for act in line.acts() if ACCEPT[-1] in act.reason and act.kind == "registered"]
    assert act.actor == acceptance.by
    shown = line.json("show", "demo")
    result = shown["results"]["colour"]
    assert result["normalized"] is None
    assert shown["mean_normalized"] is None
    assert ACCEPT[-1] in result["notes"][0]
    assert shown["members"]["colour"]["facts"]["accepted"][NO_GAIN]["reason"] == ACCEPT[-1]
    (gate,) = shown["gates"]
    assert gate["passed"]
    assert "not significantly better than the base" in gate["note"]
    assert "worse than base" in line("show", "demo").out
    assert ACCEPT[-1] in line("status", "demo").out
    line.check_settled()
    before = line.head_bytes()
    register(line, world, task, "--accept-no-gain", "--reason", "again")
    assert line.head_bytes() == before, "the first acceptance stays"


def test_an_acceptance_needs_its_reason(line: Shell, world: World, tmp_path: Path) -> None:
    task = turned(world, tmp_path)
    before = line.head_bytes()
    files = ("register", "demo", "--task", task, "--model", world.model("colour"))
    assert "--reason" in line(*files, "--accept-no-gain", code=2).err
    assert "--accept-no-gain" in line(*files, "--reason", "why", code=2).err
    assert "reason" in line(*files, "--accept-no-gain", "--reason", "  ", code=2).err
    assert line.head_bytes() == before


def test_a_model_that_equals_the_base_in_skill_joins_with_a_warning(
    line: Shell, world: World, tmp_path: Path
) -> None:
    model = tweaked(world.base, tmp_path / "model", seed=3, size=1e-6, globs=BLOCKS)
    files = ("--task", world.task("colour"), "--model", model)
    done = line("register", "demo", *files)
    assert "not significantly better than the base" in flat(done.err)
    assert "not significantly better than the base" in flat(done.out)
    assert "no gain" in line("show", "demo").out
    assert "(no gain)" in line("status", "demo").out
    result = line.json("show", "demo")["results"]["colour"]
    assert (result["gain"]["verdict"], result["normalized"]) == ("not better", None)
    line("report", "demo", "champion", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert '<td class="number">not significantly better than the base</td>' in page
    assert result["gain"]["p_value"] == 1.0


def test_the_comparison_costs_no_evaluation(
    line: Shell, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from restitch.tasks import evaluate

    kinds: list[str] = []
    measure = evaluate.evaluated

    def counted(base: Any, spec: Any, weights: Any, *rest: Any) -> Any:
        kinds.append(weights.kind)
        return measure(base, spec, weights, *rest)

    monkeypatch.setattr(evaluate, "evaluated", counted)
    line.add(world, "colour")
    assert sorted(kinds) == ["base", "finetuned", "grafted", "localizable", "merged"]


def test_a_gain_in_f1_is_decided_row_by_row(line: Shell, world: World, tmp_path: Path) -> None:
    right = described(world, tmp_path, "colour", metric="f1")
    gain = register(line, world, right)["facts"]["gain"]
    assert (gain["verdict"], gain["p_value"]) == ("better", 1 / 2000)
    wrong = turned(world, tmp_path, right=0, metric="f1", task="other")
    assert register(line, world, wrong, code=5)["facts"]["gain"]["verdict"] == "worse"


def test_without_rows_the_gain_is_not_measured_and_that_is_reported(
    line: Shell, world: World, tmp_path: Path
) -> None:
    bare = write_yaml(tmp_path / "bare.yaml", {"task": "colour"})
    done = line("register", "demo", "--task", bare, "--model", world.model("colour"))
    assert "not measured" in done.out
    assert "not measured" in line("status", "demo").out
    (model,) = line.json("status", "demo")["lines"][0]["models"]
    assert (model["measured"], model["gain"]) == (True, None)


def test_rows_that_come_later_decide_about_a_member_that_was_never_measured(
    line: Shell, world: World, tmp_path: Path
) -> None:
    bare = write_yaml(tmp_path / "bare.yaml", {"task": "colour"})
    register(line, world, bare)
    line.add(world, "number")
    line("task", "demo", "--task", turned(world, tmp_path), "--replace-task")
    found = line.json("remerge", "demo")
    assert line.state().tasks["colour"].versions[1].state == "held"
    assert list(found["record"]["members"]) == ["number"]
    line.check_settled()


def test_a_member_that_has_shown_its_skill_survives_a_wrong_description(
    line: Shell, world: World, tmp_path: Path
) -> None:
    """A typing error in a task file must not take a skill out of the model in use."""
    line.add(world, "colour")
    before = line.patch_bytes()
    line("task", "demo", "--task", turned(world, tmp_path), "--replace-task")
    done = line("remerge", "demo")
    assert "stays merged" in flat(done.err)
    assert line.state().tasks["colour"].versions[1].state == "ready"
    assert line.patch_bytes() == before
    line.check_settled()
    line.add(world, "number")
    shown = line.json("show", "demo")
    assert shown["results"]["colour"]["normalized"] is None
    assert set(shown["members"]) == {"colour", "number"}


@pytest.mark.parametrize(("expected", "fits"), [(1.0, True), (0.5, False)])
def test_a_value_that_contradicts_the_author_is_reported(
    line: Shell, world: World, tmp_path: Path, expected: float, fits: bool
) -> None:
    task = described(world, tmp_path, "colour", expected=expected)
    done = line("register", "demo", "--task", task, "--model", world.model("colour"))
    shown = line("status", "demo").out
    for text in (done.out, done.err, shown):
        assert ("its author measured" in flat(text)) is not fits
    (model,) = line.json("status", "demo")["lines"][0]["models"]
    assert model["expected"] == expected


def test_the_expected_value_belongs_to_the_model_and_not_to_the_task(
    line: Shell, world: World, tmp_path: Path
) -> None:
    register(line, world, described(world, tmp_path, "colour", expected=1.0))
    assert line.state().tasks["colour"].spec.expected is None
    again = described(world, tmp_path, "colour", expected=0.25)
    assert register(line, world, again)["facts"]["expected"] == 0.25
    found = register(line, world, world.task("colour"), "--no-remerge", model="colour-2", code=0)
    assert found["version"] == 2
    assert "expected" not in found["facts"]


@pytest.mark.parametrize("expected", [91, -0.1, "nan"])
def test_an_expected_value_that_is_no_share_is_refused(
    line: Shell, world: World, tmp_path: Path, expected: object
) -> None:
    task = described(world, tmp_path, "colour", expected=expected)
    assert "expected" in line("task", "demo", "--task", task, code=3).err


def test_an_expected_value_without_rows_is_refused(line: Shell, tmp_path: Path) -> None:
    bare = write_yaml(tmp_path / "bare.yaml", {"task": "colour", "expected": 0.9})
    assert "'expected' needs 'data'" in line("task", "demo", "--task", bare, code=3).err


def test_doctor_names_models_that_wait_for_a_person(
    line: Shell, world: World, tmp_path: Path
) -> None:
    line.add(world, "number")
    with line.inside():
        assert not [check for check in examine().checks if check.name == "models of demo"]
    register(line, world, turned(world, tmp_path), code=5)
    with line.inside():
        (check,) = [check for check in examine().checks if check.name == "models of demo"]
    assert (check.status, check.found) == ("warning", "colour 1 is held")
    assert "restitch status demo" in check.remedy


def test_a_row_of_status_has_the_mask_to_which_its_accuracy_belongs(
    line: Shell, world: World, tmp_path: Path
) -> None:
    line.add(world, "colour")
    before = line.json("status", "demo")["lines"][0]["models"][0]
    file = world.line(tmp_path / "line.yaml", retention=None, localize={"density": 0.05})
    line("init", file)
    with line.inside():
        onboard("demo", "colour", 1)
    (row,) = line.json("status", "demo")["lines"][0]["models"]
    for name in ("density", "delta_bytes", "merged"):
        assert row[name] == before[name]
    assert row["newer_mask"]["density"] == pytest.approx(0.05, abs=1e-3)
    assert "takes its newer mask, density " in line("status", "demo").out
    line("remerge", "demo")
    (row,) = line.json("status", "demo")["lines"][0]["models"]
    assert row["density"] == pytest.approx(0.05, abs=1e-3)
    assert row["newer_mask"] is None
