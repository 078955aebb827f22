"""A task without a model: declared once, changed when asked to, and refused like any other."""

import json
from pathlib import Path

import pytest

from restitch.flows.promotion.snapshot import take_snapshot
from restitch.registry.ledger.finetuned_models import ModelRef, ModelVersion
from restitch.registry.ledger.line_state import LineState
from tests.shell import Shell
from tests.worlds import World, write_yaml

pytestmark = pytest.mark.usefixtures("without_mlflow")


@pytest.fixture
def line(world: World, shell: Shell, tmp_path: Path) -> Shell:
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    return shell


def test_a_task_is_declared_once(line: Shell, world: World) -> None:
    assert line.json("task", "demo", "--task", world.task("colour")) == {
        **{"line": "demo", "task": "colour", "action": "declared", "waiting": []}
    }
    task = line.state().tasks["colour"]
    assert (task.declared, task.versions) == (True, {})
    assert task.spec.data is not None
    assert task.spec.data.content is not None
    before = line.head_bytes()
    done = line("task", "demo", "--task", world.task("colour"))
    assert "task colour is unchanged" in done.out
    line("task", "demo", "--task", world.task("colour"), "--replace-task")
    assert line.head_bytes() == before
    assert line.kinds() == ["configured", "configured"]


def test_status_lists_a_task_that_has_no_model_yet(line: Shell, world: World) -> None:
    line("task", "demo", "--task", world.task("colour"))
    assert line.json("status", "demo")["lines"][0]["without_models"] == ["colour"]
    assert "declared, without a model: colour" in line("status", "demo").out
    line.add(world, "colour")
    assert line.json("status", "demo")["lines"][0]["without_models"] == []
    assert "without a model" not in line("status", "demo").out


def test_a_declared_task_equals_a_registered_one(line: Shell, world: World) -> None:
    line("task", "demo", "--task", world.task("colour"))
    declared = line.state().tasks["colour"].spec
    line.add(world, "colour")
    assert line.state().tasks["colour"].spec == declared
    assert line.json("task", "demo", "--task", world.task("colour"))["action"] == "unchanged"


def test_another_description_is_refused_unless_it_is_asked_for(
    line: Shell, world: World, tmp_path: Path
) -> None:
    line("task", "demo", "--task", world.task("colour"))
    before = line.head_bytes()
    other = write_yaml(tmp_path / "other.yaml", {"task": "colour", "metric": "f1"})
    done = line("task", "demo", "--task", other, code=3)
    assert "differs in: data, head, metric" in done.err
    assert line.head_bytes() == before
    changed = line.json("task", "demo", "--task", other, "--replace-task")
    assert changed["action"] == "changed"
    assert line.state().tasks["colour"].spec.metric == "f1"


@pytest.mark.parametrize(
    "values",
    [
        {"task": "Colour"},
        {"task": "colour", "data": {"path": "/nowhere"}, "head": {"labels": ["a", "b"]}},
        {"task": "colour", "metrics": "f1"},
    ],
)
def test_a_file_that_cannot_be_used_changes_nothing(
    line: Shell, tmp_path: Path, values: dict[str, object]
) -> None:
    before = line.head_bytes()
    line("task", "demo", "--task", write_yaml(tmp_path / "bad.yaml", values), code=3)
    line("task", "nobody", "--task", tmp_path / "bad.yaml", code=3)
    assert line.head_bytes() == before


def test_a_task_without_a_description_affects_no_gate(line: Shell) -> None:
    """The line keeps it for waiting models; it is no member and not part of the context."""
    before = take_snapshot(line.ledger())
    ref = ModelRef(uri="models:/demo.colour/1", weights="a" * 64, config="b" * 64)
    waiting = ModelVersion(model=ref, state="waiting", reason="not described")

    def change(line_state: LineState) -> LineState:
        return line_state.with_undeclared("colour").with_version("colour", waiting)

    line.ledger().act("waiting", "tester", "", change)
    after = take_snapshot(line.ledger())
    assert (after.members, after.context) == ((), before.context)
    assert line.state().tasks["colour"].declared is False
    (shown,) = line.json("status")["lines"][0]["models"]
    assert (shown["state"], shown["reason"]) == ("waiting", "not described")
    assert "not described" in line("status").out


def test_a_task_counts_as_declared_by_default(line: Shell, world: World) -> None:
    line("register", "demo", "--task", world.task("colour"), "--model", world.model("colour"))
    old = json.loads(line.head_bytes() or b"")
    for task in old["tasks"].values():
        del task["declared"]
        for version in task["versions"].values():
            del version["mlflow"]
    assert LineState.model_validate(old) == line.state()
