"""A killed decision counts fully or not at all; a retry makes it count once."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from restitch.registry.ledger.records import state_of
from tests.cli.test_kill import calls_in, kill_points, run, some_or_all
from tests.conftest import Three
from tests.flows.test_mlflow_projection import client_of
from tests.shell import Shell

WHY = ("--reason", "a test")
ROLLBACK = ("rollback", "demo", "2", *WHY)
DECISIONS = {
    "rollback": ROLLBACK,
    "promote": ("promote", "demo", "1", *WHY),
    "retire": ("retire", "demo", "number", "--no-remerge", *WHY),
    "pin": ("pin", "demo", *WHY),
}


def copied(three: Three, folder: Path) -> Shell:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(three.shell.home, folder)
    return Shell(folder)


def state(shell: Shell) -> dict[str, Any]:
    return state_of(shell.state())


@some_or_all
@pytest.mark.usefixtures("without_mlflow")
@pytest.mark.parametrize("command", DECISIONS.values(), ids=DECISIONS)
def test_a_decision_can_be_killed_at_every_write(
    three: Three, tmp_path: Path, command: tuple[str, ...], every: bool
) -> None:
    undisturbed, report = copied(three, tmp_path / "undisturbed"), tmp_path / "calls"
    before = state(undisturbed)
    assert run(undisturbed, command, report=report) == 0
    calls = calls_in(report)
    assert calls > 3
    seen = set()
    for limit in kill_points(calls, every):
        shell = copied(three, tmp_path / "killed")
        assert run(shell, command, limit) == -signal.SIGKILL
        found = state(shell)
        assert found in (before, state(undisturbed)), "made or not made, and nothing between"
        seen.add(found == before)
        shell(*command)
        assert state(shell) == state(undisturbed)
        assert shell.kinds() == undisturbed.kinds()
        assert shell.json("verify", "demo", code=None)["acts"] == len(shell.kinds())
    assert True in seen


def test_a_kill_before_mlflow_leaves_the_alias_to_the_next_remerge(
    three: Three, tmp_path: Path
) -> None:
    shell = copied(three, tmp_path / "home")

    def alias() -> str:
        found = client_of(shell).get_model_version_by_alias("demo", "champion")
        return str(found.tags["restitch.version"])

    assert run(shell, ROLLBACK) == 0  # the child leaves MLflow out, as if it were killed there
    assert shell.state().champion == 2
    assert alias() == "3"
    shell("remerge", "demo")
    assert alias() == "2"
    (rolled,) = client_of(shell).search_runs(
        [client_of(shell).get_experiment_by_name("demo.audit").experiment_id],
        "tags.`restitch.kind` = 'rolled-back'",
    )
    assert rolled.data.params["reason"].endswith("pinned: a test")
