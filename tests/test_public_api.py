"""What `import restitch` offers."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import restitch
from restitch.merging.progress import Progress
from tests.shell import Shell
from tests.worlds import World


def test_importing_restitch_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'mlflow', 'prefect', 'pydantic'}"
    code = f"import restitch, sys; print(*{heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_public_name_is_there() -> None:
    assert all(callable(getattr(restitch, name)) for name in restitch.__all__)


class Collected(restitch.Reporter):
    """Keeps what is reported."""

    def __init__(self) -> None:
        self.titles: list[str] = []
        self.done: list[tuple[int, int]] = []

    @contextmanager
    def working(self, title: str) -> Iterator[Progress]:
        """Keep the title, and every call about progress."""
        self.titles.append(title)
        yield lambda done, total: self.done.append((done, total))


def described(world: World, name: str) -> dict[str, Any]:
    """A task as keys."""
    values: dict[str, Any] = yaml.safe_load(world.task(name).read_text())
    return values


@pytest.mark.usefixtures("without_mlflow")
def test_a_line_is_made_merged_and_used_from_python(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    values = yaml.safe_load(world.line(tmp_path / "line.yaml", retention=None).read_text())
    reporter = Collected()
    with shell.inside(), restitch.reporting_to(reporter):
        line = restitch.Line.create(values)
        before = described(world, "colour")
        outcome = line.register(before, world.model("colour"))
        assert outcome.onboarded.state == "ready"
        assert before == described(world, "colour"), "the caller's values are not changed"
        line.register(world.task("number"), world.model("number"))
        champion = line.champion
        assert (champion.number, set(champion.record.members)) == (2, {"colour", "number"})
        champion.export(tmp_path / "merged")
        expected = load_file(tmp_path / "merged" / "model.safetensors")
        loaded = champion.load().state_dict()
        shared = expected.keys() & loaded.keys()
        assert shared
        assert all(torch.equal(loaded[name], expected[name]) for name in shared)
        assert line.remerge().action == "unchanged"
        assert line.diff(1, 2)["members"]
        assert line.history()["acts"]
        assert line.verify().exit_code == 0
        line.rollback(1, "a test")
        assert line.champion.number == 1
    assert reporter.titles
    assert all(done <= total for done, total in reporter.done)
    assert shell("show", "demo", "champion").out.startswith("demo version 1")


def test_errors_are_those_of_the_commands(world: World, shell: Shell) -> None:
    with shell.inside():
        with pytest.raises(restitch.BadInput, match="there is no line 'photos'"):
            restitch.Line("photos")
        with pytest.raises(
            restitch.RestitchError, match="unknown key 'basis'; did you mean 'base'"
        ):
            restitch.Line.create({"line": "demo", "basis": str(world.base)})
        with pytest.raises(restitch.BadInput, match="the line names no method"):
            restitch.Line.create(
                {"line": "demo", "base": str(world.base), "family": "text-encoder"}
            )
