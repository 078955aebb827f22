"""Tables show the measurements, and each measurement is taken once."""

import json
from pathlib import Path

from benchmarks.localizers import Measurements
from benchmarks.localizers_tables import mean_text, tables


def test_a_measurement_is_taken_once(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    assert Measurements(path).get(("a", 0.1, 0), lambda: 1.5) == 1.5
    again = Measurements(path)
    assert again.get(("a", 0.1, 0), lambda: 2.0) == 1.5
    assert ("a", 0.1, 0) in again
    assert ("a", 0.1, 1) not in again


def test_seeds_are_shown_as_mean_with_their_interval() -> None:
    assert mean_text([0.5]) == "0.500"
    assert mean_text([0.4, 0.5, 0.6]) == "0.500 ± 0.248", "4.303 x 0.1 / sqrt(3)"


def test_tables_show_the_measurements(tmp_path: Path) -> None:
    measured = {
        "frontier": {
            "t | finetuned": 0.8,
            "t | fisher | seconds | 0": 3.0,
            "t | fisher | 0.1 | 0": 0.6,
            "t | fisher | 0.1 | 1": 0.6,
        },
        "official": {
            "t | official": {"seconds": 10.0, "kept": 1234, "grafted": 0.7},
            "t | fisher": {"seconds": 2.0, "grafted": 0.75},
        },
        "merged": {
            "t | finetuned | test": 0.8,
            "test | fisher | 0.1 | mean | 0 | t": 0.9,
            "test | fisher | 0.1 | mean | 0 | u": 0.7,
        },
        "overhead": {"fisher | 0": 1.061, "fisher | 1": 1.07},
        "int8": {
            f"0.1 | {values} | {task} | {what}": 0.5 + (values == "int8") * (0.01 + 0.01 * place)
            for values in ("exact", "int8")
            for place, task in enumerate("tu")
            for what in ("bytes", "grafted", "merged")
        },
    }
    for part, values in measured.items():
        (tmp_path / f"{part}.json").write_text(json.dumps(values))
    text = tables(tmp_path)
    assert "| t | 0.800 | fisher | 0.600 ± 0.000 |" in text
    assert "| **share of finetuned** | 1 | fisher | 0.750 |" in text
    assert "| t | 1,234 | fisher | 0.750 | 2.0 | 0.20 |" in text
    assert "| test | fisher | 10% | 0.800 |" in text
    assert "| fisher | 1.06, 1.07 |" in text
    assert "| 10% | int8 | 0.52 | 0.5150 | 0.020 | 0.5150 | 0.020 |" in text
