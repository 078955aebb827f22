"""The fuzzer's command counts its inputs, and fails with the input that shows a fault."""

import json
from pathlib import Path

import pytest
from hypothesis import strategies as st

from tests.stress import fuzz
from tests.stress.fuzz import Reader, main


def test_inputs_and_outcomes_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    assert main(["--examples", "20", "--only", "webhook", "--json", str(file)]) == 0
    (found,) = json.loads(file.read_text())
    assert found["inputs"] == sum(found["outcomes"].values()) == 20
    assert found["found"] is None


def test_a_fault_is_shown_with_its_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(value: int) -> str:
        if value > 3:
            raise KeyError("no explained error")
        return "read"

    monkeypatch.setattr(fuzz, "READERS", (Reader("numbers", st.integers(0, 9), check),))
    assert main(["--examples", "50"]) == 1
    shown = capsys.readouterr().out
    assert "no explained error" in shown
    assert "value=4" in shown
