"""Gates decide on numbers alone; each outcome names the value and the limit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from restitch.registry.gates.gate import Drop, GateOutcome, Measured, NotMeasured
from restitch.registry.gates.registry import GATES, check_gates
from restitch.registry.record import Interval
from restitch.registry.specs.gates import GatesSpec

EVERYTHING = Measured(
    normalized={"a": 0.0},
    drops={"a": Drop(value=0.9, is_noise=False, against=1)},
    joining=frozenset({"a"}),
    retention=0.1,
    patch_bytes=10**9,
)


def drop(
    value: float,
    is_noise: bool,
    interval: Interval | None = None,
    p_value: float | None = None,
) -> Measured:
    lost = Drop(value=value, is_noise=is_noise, against=1, interval=interval, p_value=p_value)
    return Measured(drops={"a": lost})


def test_a_line_without_gates_checks_nothing() -> None:
    assert check_gates({}, EVERYTHING) == ()


def test_gates_are_checked_in_the_order_of_their_names() -> None:
    limits = {"min_retention": 1.0, "min_normalized": 1.0, "max_task_drop": 0, "max_patch_bytes": 1}
    checked = [outcome.gate for outcome in check_gates(limits, EVERYTHING)]
    assert checked == ["max_patch_bytes", "max_task_drop", "min_normalized", "min_retention"]
    assert checked == [name for name in GATES if name in limits]


NOTHING = NotMeasured("the rows are away")
UNMEASURED = Measured(
    normalized={"a": NOTHING},
    drops={"a": NOTHING},
    joining=frozenset({"a"}),
    retention=NOTHING,
    patch_bytes=NOTHING,
)


@pytest.mark.parametrize("name", GATES)
def test_a_gate_without_a_measurement_blocks_and_says_so(name: str) -> None:
    (outcome,) = check_gates({name: 1}, UNMEASURED)
    assert outcome.blocks
    assert (outcome.value, outcome.verdict) == (None, "not measured")
    assert str(outcome.note).startswith(f"{name} of ")
    assert str(outcome.note).endswith(": not measured, because the rows are away")


def test_a_joining_task_of_which_nothing_is_known_blocks() -> None:
    (outcome,) = check_gates({"min_normalized": 0.5}, Measured(joining=frozenset({"a"})))
    assert (outcome.task, outcome.verdict) == ("a", "not measured")


@pytest.mark.parametrize("name", ["max_task_drop", "min_normalized"])
def test_a_gate_on_tasks_without_a_task_to_check_passes_and_says_so(name: str) -> None:
    (outcome,) = check_gates({name: 0.5}, Measured())
    assert (outcome.value, outcome.verdict) == (None, "passed")
    assert outcome.note in (
        "max_task_drop: no task of the champion is in this version",
        "min_normalized: no task joins",
    )


def test_a_gate_that_only_warns_does_not_block_without_a_measurement() -> None:
    (outcome,) = check_gates({"min_retention": 0.9}, UNMEASURED, ("min_retention",))
    assert (outcome.blocks, outcome.verdict) == (False, "not measured")
    assert str(outcome.note).endswith("because the rows are away (a warning)")


@given(
    limits=st.dictionaries(st.sampled_from(sorted(GATES)), st.floats(0, 1), min_size=1),
    known=st.sets(st.sampled_from(sorted(GATES))),
    loss=st.floats(-1, 1),
    is_noise=st.booleans(),
)
def test_a_version_passes_only_if_every_gate_was_measured_or_has_nothing_to_check(
    limits: dict[str, float], known: set[str], loss: float, is_noise: bool
) -> None:
    lost = Drop(value=loss, is_noise=is_noise, against=1)
    measured = Measured(
        normalized={"a": 1.0 if "min_normalized" in known else NOTHING},
        drops={"a": lost if "max_task_drop" in known else NOTHING},
        joining=frozenset({"a"}),
        retention=1.0 if "min_retention" in known else NOTHING,
        patch_bytes=0 if "max_patch_bytes" in known else NOTHING,
    )
    outcomes = check_gates(limits, measured)
    assert {outcome.gate for outcome in outcomes} == limits.keys()
    for outcome in outcomes:
        assert (outcome.verdict == "not measured") == (outcome.gate not in known)
        assert outcome.blocks == (outcome.verdict != "passed")


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
        {"max_task_drop": -0.1},
        {"min_normalized": 1.5},
        {"min_retention": 10**400},
        {"min_retention": float("nan")},
        {"min_retention": float("inf")},
        {"min_retentoin": 1},
        {"warn": ("min_retentoin",)},
        {"warn": ("min_retention",)},
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        GatesSpec.model_validate(values)


@pytest.mark.parametrize("name", ["max_task_drop", "min_normalized", "min_retention"])
@given(percent=st.integers(2, 100))
def test_a_percentage_is_refused_with_the_fraction_to_write(name: str, percent: int) -> None:
    with pytest.raises(ValidationError) as caught:
        GatesSpec.model_validate({name: percent})
    advice = f"write {percent / 100:g}, not {percent}"
    assert f"expected a fraction from 0 to 1, found {percent}; {advice}" in str(caught.value)


def test_limits_survive_json() -> None:
    gates = GatesSpec.model_validate({"min_retention": 0.5, "warn": ("min_retention",)})
    assert GatesSpec.from_json(gates.to_json()) == gates
