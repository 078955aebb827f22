"""Gates decide over numbers alone; each decision names the value and the limit."""

from restitch.flows.promotion.gates import Drop, Gates, Measured, check_gates


def test_no_gates_no_checks() -> None:
    reached = Measured({"a": 0.0}, {"a": Drop(0.9, False)}, 0.1, None, 10**9)
    assert check_gates(Gates(), reached, {"a"}) == ()


def test_retention_at_the_limit_passes_and_below_it_fails() -> None:
    gates = Gates(min_retention=0.9)
    assert [c.passed for c in check_gates(gates, Measured(retention=0.9), set())] == [True]
    reached = Measured(retention=0.8999, retention_interval=(0.87, 0.93))
    (check,) = check_gates(gates, reached, set())
    assert not check.passed
    assert check.interval == (0.87, 0.93)
    assert str(check) == "min_retention of the general benchmark: 0.8999 < 0.9"


def test_a_gate_without_a_measurement_does_not_block() -> None:
    gates = Gates(min_retention=0.9, max_task_drop=0.0, min_normalized=1.0, max_patch_bytes=1)
    assert check_gates(gates, Measured(), set()) == ()


def test_a_drop_over_the_limit_blocks() -> None:
    (check,) = check_gates(
        Gates(max_task_drop=0.05),
        Measured(drops={"a": Drop(0.1, False, (0.05, 0.15), 0.003)}),
        {"b"},
    )
    assert (check.subject, check.passed, check.interval) == ("a", False, (0.05, 0.15))
    assert str(check) == "max_task_drop of a: 0.1000 > 0.05 (p = 0.003)"


def test_a_drop_that_chance_would_make_passes_and_is_said() -> None:
    (check,) = check_gates(
        Gates(max_task_drop=0.05), Measured(drops={"a": Drop(0.1, True, (-0.1, 0.3), 0.4)}), set()
    )
    assert check.passed
    assert str(check) == "max_task_drop of a: 0.1000 > 0.05, within noise (p = 0.4)"


def test_a_drop_within_the_limit_passes_however_certain_it_is() -> None:
    (check,) = check_gates(
        Gates(max_task_drop=0.05), Measured(drops={"a": Drop(0.05, False, None, 1e-9)}), set()
    )
    assert check.passed
    assert str(check) == "max_task_drop of a: 0.0500 <= 0.05"


def test_only_joining_tasks_need_their_share_of_the_finetuned_accuracy() -> None:
    gates = Gates(min_normalized=0.95)
    checks = check_gates(gates, Measured({"a": 0.5, "b": 1.0}), {"b"})
    assert [(c.subject, c.passed) for c in checks] == [("b", True)]


def test_a_patch_over_its_size_blocks() -> None:
    for size, passed in ((1000, True), (1001, False)):
        (check,) = check_gates(Gates(max_patch_bytes=1000), Measured(patch_bytes=size), set())
        assert check.passed is passed
    assert str(check) == "max_patch_bytes of the patch: 1,001 > 1,000"


def test_a_gate_that_warns_blocks_nothing_and_says_so() -> None:
    gates = Gates(min_retention=0.9, max_patch_bytes=10, warn=("min_retention",))
    warning, block = check_gates(gates, Measured(retention=0.5, patch_bytes=11), set())
    assert (warning.passed, warning.blocks) == (False, False)
    assert (block.passed, block.blocks) == (False, True)
    assert str(warning).endswith("0.5000 < 0.9 (a warning)")
