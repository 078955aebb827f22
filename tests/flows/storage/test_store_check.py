"""The check of a line's state against its acts."""

from typing import Any

import pytest

from restitch.flows.storage.store_check import trail_contradiction
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.records import Entry, replay
from restitch.registry.specs.task import TaskSpec
from restitch.registry.store.folder import FolderStore
from restitch.registry.store.objects import ObjectStore
from tests.registry.builders import line_spec, model, model_ref, with_task

RETENTION = TaskSpec.model_validate(
    {
        "task": "general",
        "data": {"path": "/d", "test": "t.jsonl"},
        "prompt": "{text}",
        "choices": ["a", "b"],
    }
)


@pytest.fixture
def line(tmp_path) -> Ledger:
    """A line with a model."""
    line = Ledger(ObjectStore(FolderStore(tmp_path)), "line")
    line.create(line_spec(retention=RETENTION), model_ref("base"), "tester", "")
    line.act("registered", "t", "", lambda state: with_task(state, "a", model()))
    return line


def stored_before(entry: Entry, *keys: str) -> Entry:
    """The act as a version wrote it that did not know these keys yet."""
    after = {
        pointer: without(value, *keys)
        for pointer, value in entry.after.items()
        if pointer.rpartition("/")[2] not in keys
    }
    return entry.model_copy(update={"after": after})


def without(value: Any, *keys: str) -> Any:
    if not isinstance(value, dict):
        return value
    return {k: without(v, *keys) for k, v in value.items() if k not in keys}


@pytest.mark.parametrize(
    "keys",
    [("chat",), ("compute", "notify"), ("score", "metric"), ("gates",), ("quotes", "sample")],
)
def test_acts_of_before_an_optional_key_existed_do_not_contradict_the_state(line, keys):
    trail = [stored_before(entry, *keys) for entry in line.entries(newest_first=False)]
    assert without(replay(trail), *keys) == replay(trail)
    assert trail_contradiction(line.state(), trail) is None


def test_acts_may_change_a_part_of_a_value_that_no_earlier_act_gives(line):
    def raise_gate(state):
        gates = state.spec.gates.model_copy(update={"max_task_drop": 0.02})
        return state.model_copy(update={"spec": state.spec.model_copy(update={"gates": gates})})

    line.act("configured", "t", "", raise_gate)
    first, *rest = line.entries(newest_first=False)
    trail = [stored_before(first, "gates"), *rest]
    assert "/spec/gates/max_task_drop" in trail[-1].after
    assert trail_contradiction(line.state(), trail) is None


def test_another_value_contradicts_acts_of_before_a_key_existed(line):
    trail = [stored_before(entry, "chat") for entry in line.entries(newest_first=False)]
    state = line.state().model_copy(update={"next_version": 5})
    found = trail_contradiction(state, trail)
    assert found == "/next_version is 5, but its acts give 1"


def test_acts_that_give_no_valid_state_are_compared_as_they_are(line):
    first, *rest = line.entries(newest_first=False)
    wrong = first.model_copy(update={"after": {**first.after, "/next_version": 0}})
    found = trail_contradiction(line.state(), [wrong, *rest])
    assert found == "/next_version is 1, but its acts give 0"
