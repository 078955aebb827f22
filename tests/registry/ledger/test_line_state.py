from collections.abc import Callable

import pytest
from pydantic import ValidationError

from restitch.registry.ledger.finetuned_models import ModelVersion
from restitch.registry.ledger.line_state import LineState
from restitch.registry.specs.task import TaskSpec
from tests.registry.builders import TIME, digest, line_spec, line_state, model, ready, with_task


def test_the_newest_ready_model_of_a_task_is_its_member():
    line = with_task(line_state(), "a", ready("1"))
    line = with_task(line, "a", ready("2"))
    line = with_task(line, "a", model("3"))
    assert [(m.task, m.version) for m in line.members] == [("a", 2)]
    line = line.with_state("a", 2, "quarantined", "it is broken")
    assert [(m.task, m.version) for m in line.members] == [("a", 1)]
    assert line.tasks["a"].versions[2].reason == "it is broken"


def test_members_are_ordered_by_the_bytes_of_the_task_in_any_order_of_joining():
    names = ["b", "a-b", "a_b", "a", "b0", "0"]
    orders = (names, names[::-1])
    for order in orders:
        line = line_state()
        for name in order:
            line = with_task(line, name, ready(name))
        assert [m.task for m in line.members] == ["0", "a", "a-b", "a_b", "b", "b0"]


def test_no_model_number_is_used_twice():
    line = with_task(with_task(line_state(), "a", ready("1")), "a", ready("2"))
    line = line.with_state("a", 2, "retired", "not wanted")
    assert line.with_version("a", model("3")).tasks["a"].next_version == 4


def test_models_in_a_state_come_oldest_first():
    line = with_task(line_state(), "b", model("1", registered_at="2026-01-01T00:00:00+00:00"))
    line = with_task(line, "a", model("2", registered_at="2026-01-02T00:00:00+00:00"))
    line = with_task(line, "a", ready("3"))
    assert [key for key, _ in line.in_state("registered", "waiting")] == [("b", 1), ("a", 1)]


def test_a_change_of_state_leaves_the_rest_of_a_model():
    line = with_task(line_state(), "a", model("x", facts={"density": 0.5}))
    line = line.with_state("a", 1, "ready", mask=digest("m"), delta=digest("d"))
    found = line.tasks["a"].versions[1]
    assert (found.state, found.mask, found.facts.density) == ("ready", digest("m"), 0.5)
    assert found.registered_at == TIME


def test_a_model_without_a_mask_is_never_ready():
    with pytest.raises(ValidationError, match="needs a mask"):
        model(state="ready")
    with pytest.raises(ValidationError, match="needs a mask"):
        with_task(line_state(), "a", model()).with_state("a", 1, "ready")


def test_a_change_makes_a_new_state_and_leaves_the_old_one():
    old = with_task(line_state(), "a", ready())
    before = old.to_json()
    old.with_merged(digest("record")).promoted(1)
    old.with_version("a", model("other"))
    old.with_task(TaskSpec(task="b"))
    assert old.to_json() == before
    with pytest.raises(ValidationError):
        setattr(old, "champion", 3)  # noqa: B010


def test_a_version_that_did_not_pass_is_never_the_candidate():
    line = line_state().with_merged(digest("1"), passed=False)
    assert (line.newest, line.candidate) == (1, None)
    line = line.with_merged(digest("2")).with_merged(digest("3"), passed=False)
    assert (line.newest, line.candidate) == (3, 2), "the one that passed still waits"


def test_a_promotion_supersedes_older_candidates():
    line = line_state().with_merged(digest("1")).with_merged(digest("2"), passed=False)
    assert line.promoted(2).candidate is None
    assert line.with_merged(digest("3")).promoted(2).candidate == 3


def test_a_merged_version_is_the_candidate_until_it_is_promoted():
    line = line_state().with_merged(digest("1"))
    assert (line.newest, line.candidate, line.champion) == (1, 1, None)
    line = line.promoted(1).with_merged(digest("2"))
    assert (line.newest, line.candidate, line.champion) == (2, 2, 1)
    assert line.promoted(1).candidate == 2, "a rollback leaves the candidate alone"
    assert line.promoted(2).candidate is None


@pytest.mark.parametrize(
    "broken",
    [
        {"champion": 1},
        {"candidate": 2},
        {"versions": {1: digest("1")}, "next_version": 1},
        {"line": "another"},
        {"unknown": 1},
    ],
)
def test_a_state_that_contradicts_itself_is_refused(broken):
    with pytest.raises(ValidationError):
        LineState.model_validate(line_state().to_json() | broken)


def test_an_impossible_change_is_refused():
    line = with_task(line_state(), "a", model())
    changes: list[Callable[[], LineState]] = [
        lambda: line.promoted(1),
        lambda: line.with_state("a", 2, "retired"),
        lambda: line.with_state("b", 1, "retired"),
        lambda: line.with_version("b", model()),
        lambda: line.with_spec(line_spec("another")),
    ]
    for change in changes:
        with pytest.raises(ValueError):
            change()


def test_another_description_keeps_the_models():
    line = with_task(line_state(), "a", model()).with_task(TaskSpec(task="a", metric="f1"))
    assert line.tasks["a"].spec.metric == "f1"
    assert list(line.tasks["a"].versions) == [1]


def test_a_stored_state_is_read_back_unchanged():
    line = with_task(line_state(), "a", ready()).with_merged(digest("1"))
    assert LineState.model_validate_json(line.model_dump_json()) == line
    stored = ModelVersion.model_validate_json(ready().model_dump_json())
    assert stored == ready()
