"""Thirty kills of a running stack: nothing is lost, doubled or wrong. Takes minutes."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shell import ROOT
from tests.stress.chaos import PLAN, chosen_kinds


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nothing_is_lost_doubled_or_wrong_while_processes_are_killed(tmp_path: Path) -> None:
    out = tmp_path / "chaos.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.stress.chaos", "--kills", "30"),
            *("--world", str(tmp_path / "world"), "--json", str(out)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert len(found["kills"]) >= 30
    assert (found["lost"], found["doubled"], found["wrong"]) == ([], [], [])
    inside = [k for k in found["kills"] if k["phase"].startswith(("onboard", "remerge"))]
    assert len(inside) / len(found["kills"]) >= 0.6


def test_every_moment_exists(tmp_path: Path) -> None:
    """Workers load this module, and a wrong name of a method in it would stop them all."""
    script = (
        "import tests.stress.chaos_entry as e, restitch.flows.export as x\n"
        "print(bool(x._write_heads))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "RESTITCH_CHAOS": str(tmp_path), "RESTITCH_HOME": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize("kills", [1, 30, 200])
def test_kills_follow_the_proportions_of_the_plan(kills: int) -> None:
    order = chosen_kinds(kills, random.Random(1))
    assert len(order) == kills
    assert order == chosen_kinds(kills, random.Random(1))
    for kind, share in PLAN.items():
        assert abs(order.count(kind) - kills * share / sum(PLAN.values())) < 1
