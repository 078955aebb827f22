"""The comparison on real tasks runs the product and gives the expected numbers."""

import os
from pathlib import Path

import pytest

from benchmarks.text import main

SHARED = Path(__file__).parents[3] / "shared"


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # The script sets RESTITCH_HOME for its own process.
    monkeypatch.setattr(os, "environ", os.environ.copy())


def rows_of(text: str, first: str) -> list[list[str]]:
    """The cells of all table rows with this first cell."""
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
    return [row for row in cells if row[0] == first]


@pytest.mark.slow
@pytest.mark.realdata
def test_real_clips_merge_and_keep_what_the_base_knows(tmp_path: Path) -> None:
    data = SHARED / "vision"
    if not data.exists():
        pytest.skip("the real data is not next to the checkout")
    table = tmp_path / "table.md"
    # These models changed embeddings and norms too, so masks must be allowed to hold them.
    arguments = f"--data {data} --family clip --dataless 0.2 --trained= --no-reference"
    main([*arguments.split(), "--include", "vision_model.*", "--markdown", str(table)])
    text = table.read_text()
    for task, base, finetuned in (("digits", 0.058, 0.905), ("mnist", 0.199, 0.835)):
        ((_, density, at_base, at_finetuned, grafted, merged, *_),) = rows_of(text, task)
        assert density == "20.00%"
        assert float(at_base) == pytest.approx(base, abs=0.005)
        assert float(at_finetuned) == pytest.approx(finetuned, abs=0.005)
        assert float(grafted) > float(at_base)
        assert float(merged) > float(at_base)
    (summary,) = rows_of(text, "dataless 20%")
    assert 0.8 < float(summary[-2]) <= 1.05
