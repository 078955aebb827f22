"""Gates decide on numbers alone; each outcome names the value and the limit."""

import pytest
from pydantic import ValidationError

from restitch.registry.gates.gate import Drop, GateOutcome, Measured
from restitch.registry.gates.registry import GATES, check_gates
from restitch.registry.record import Interval
from restitch.registry.specs.gates import GatesSpec

EVERYTHING = Measured(
    normalized={"a": 0.0},
    drops={"a": Drop(0.9, False)},
    joining=frozenset({"a"}),
    retention=0.1,
    patch_bytes=10**9,
)


def drop(*values: object) -> Measured:
    return Measured(drops={"a": Drop(*values)})  # type: ignore[arg-type]


def test_a_line_without_gates_checks_nothing() -> None:
    assert check_gates({}, EVERYTHING) == ()


def test_gates_are_checked_in_the_order_of_their_names() -> None:
    limits = {"min_retention": 1.0, "min_normalized": 1.0, "max_task_drop": 0, "max_patch_bytes": 1}
    checked = [outcome.gate for outcome in check_gates(limits, EVERYTHING)]
    assert checked == ["max_patch_bytes", "max_task_drop", "min_normalized", "min_retention"]
    assert checked == [name for name in GATES if name in limits]


@pytest.mark.parametrize("name", GATES)
def test_a_gate_without_a_measurement_does_not_block(name: str) -> None:
    assert check_gates({name: 1}, Measured()) == ()


@pytest.mark.parametrize("name", GATES)
def test_every_gate_is_described_and_named_like_its_file(name: str) -> None:
    gate = GATES[name]
    assert type(gate).__module__ == f"restitch.registry.gates.{name}"
    assert gate.description.endswith(".")
    assert GatesSpec.model_fields[name].description == gate.description


def test_retention_at_the_limit_passes_and_below_it_fails() -> None:
    limits = {"min_retention": 0.9}
    assert [o.passed for o in check_gates(limits, Measured(retention=0.9))] == [True]
    interval = Interval(low=0.87, high=0.93)
    (outcome,) = check_gates(limits, Measured(retention=0.8999, retention_interval=interval))
    assert outcome.blocks
    assert outcome.interval == interval
    assert outcome.note == "min_retention of the general benchmark: 0.8999 < 0.9"


def test_a_drop_over_the_limit_blocks() -> None:
    interval = Interval(low=0.05, high=0.15)
    (outcome,) = check_gates({"max_task_drop": 0.05}, drop(0.1, False, interval, 0.003))
    assert (outcome.task, outcome.blocks, outcome.interval) == ("a", True, interval)
    assert outcome.note == "max_task_drop of a: 0.1000 > 0.05 (p = 0.003)"


def test_a_drop_that_can_be_chance_passes_and_says_so() -> None:
    interval = Interval(low=-0.1, high=0.3)
    (outcome,) = check_gates({"max_task_drop": 0.05}, drop(0.1, True, interval, 0.4))
    assert outcome.passed
    assert outcome.note == "max_task_drop of a: 0.1000 > 0.05, within noise (p = 0.4)"


def test_a_drop_within_the_limit_passes_however_certain_it_is() -> None:
    (outcome,) = check_gates({"max_task_drop": 0.05}, drop(0.05, False, None, 1e-9))
    assert outcome.passed
    assert outcome.note == "max_task_drop of a: 0.0500 <= 0.05"


def test_only_joining_tasks_need_their_share_of_the_finetuned_accuracy() -> None:
    measured = Measured({"a": 0.5, "b": 1.0}, joining=frozenset({"b"}))
    outcomes = check_gates({"min_normalized": 0.95}, measured)
    assert [(o.task, o.passed) for o in outcomes] == [("b", True)]


def test_a_patch_over_its_size_blocks() -> None:
    outcomes: list[GateOutcome] = []
    for size in (1000, 1001):
        outcomes += check_gates({"max_patch_bytes": 1000}, Measured(patch_bytes=size))
    assert [o.passed for o in outcomes] == [True, False]
    assert outcomes[-1].note == "max_patch_bytes of the patch: 1,001 > 1,000"
    assert outcomes[-1].task is None


def test_a_gate_that_only_warns_does_not_block_and_says_so() -> None:
    limits = {"min_retention": 0.9, "max_patch_bytes": 10}
    block, warning = check_gates(
        limits, Measured(retention=0.5, patch_bytes=11), ("min_retention",)
    )
    assert (block.passed, block.blocks) == (False, True)
    assert (warning.passed, warning.blocks, warning.action) == (False, False, "warn")
    assert str(warning.note).endswith("0.5000 < 0.9 (a warning)")


def test_a_limit_may_be_written_as_a_size() -> None:
    gates = GatesSpec.model_validate({"max_patch_bytes": "500MB"})
    assert gates.limits == {"max_patch_bytes": 500 * 10**6}


@pytest.mark.parametrize(
    "values",
    [
        {"max_patch_bytes": "many"},
        {"max_patch_bytes": 0},
        {"max_task_drop": 2},
        {"min_retention": float("inf")},
        {"min_retentoin": 1},
        {"warn": ("min_retentoin",)},
        {"warn": ("min_retention",)},
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        GatesSpec.model_validate(values)


def test_limits_survive_json() -> None:
    gates = GatesSpec.model_validate({"min_retention": 0.5, "warn": ("min_retention",)})
    assert GatesSpec.from_json(gates.to_json()) == gates
