from benchmarks.adapters import KINDS, Cost, cost_table


def cost(stored: int, seconds: float, merged: str) -> Cost:
    return Cost(seconds, 2 * seconds, 10_000_000, stored, 40_000_000, ("a", "b"), merged)


def test_the_table_compares_adapters_with_whole_models() -> None:
    adapters, whole = cost(20_000_000, 1.0, "x"), cost(80_000_000, 4.0, "y")
    *_, row = cost_table({"a line": dict(zip(KINDS, (adapters, whole), strict=True))}).splitlines()
    assert row == (
        "| a line | 20.0 MB (80.0) | 0.50 (2.00) | 1.00 (4.00) | 0.25 | 2.00 (8.00) | 0.25"
        " | 10 (10) | same | other |"
    )
