"""Gates decide over numbers alone; each decision names the value and the limit."""

from flows.gates import Gates, Measured, check_gates


def measured(retention=None, **accuracy: float) -> Measured:
    return Measured(accuracy, {task: value / 0.9 for task, value in accuracy.items()}, retention)


def test_no_gates_no_checks() -> None:
    assert check_gates(Gates(), measured(0.1, a=0.0), measured(a=0.9), {"a"}) == ()


def test_retention_at_the_limit_passes_and_below_it_fails() -> None:
    gates = Gates(min_retention=0.9)
    assert [c.passed for c in check_gates(gates, measured(0.9), None, set())] == [True]
    (check,) = check_gates(gates, measured(0.8999), None, set())
    assert not check.passed
    assert str(check) == "min_retention of the general benchmark: 0.8999 < 0.9"


def test_a_gate_without_a_measurement_does_not_block() -> None:
    gates = Gates(min_retention=0.9, max_task_drop=0.0, min_normalized=1.0)
    assert check_gates(gates, measured(None), None, set()) == ()


def test_a_drop_is_counted_against_the_champion_and_only_on_tasks_of_both() -> None:
    gates = Gates(max_task_drop=0.05)
    checks = check_gates(gates, measured(a=0.8, b=0.5), measured(a=0.9, c=1.0), {"b"})
    assert [(c.subject, c.passed) for c in checks] == [("a", False)]


def test_only_joining_tasks_need_their_share_of_the_finetuned_accuracy() -> None:
    gates = Gates(min_normalized=0.95)
    checks = check_gates(gates, measured(a=0.5, b=0.9), None, {"b"})
    assert [(c.subject, c.passed) for c in checks] == [("b", True)]
