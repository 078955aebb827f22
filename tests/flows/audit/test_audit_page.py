"""The queries of docs/how-to/audit-in-mlflow.md, run on a line with the history of the page.

Every block of Python on the page is run in order, next to the home, as a reader would. It prints
the text block that follows it, except for digests, digits and spacing, which depend on the
version of torch.
"""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.conftest import NewHome
from tests.shell import ROOT, Shell
from tests.worlds import World

PAGE = ROOT / "docs" / "how-to" / "audit-in-mlflow.md"
_BLOCK = re.compile(r"```python\n(.*?)```\n+```text\n(.*?)```", re.DOTALL)
_VARIES = re.compile(r"\b[0-9a-f]{12,}\b|\d+\.\d+|\s+")


class Calendar(datetime):
    """A clock with the days of the story, one second later at each reading."""

    story = datetime(2026, 3, 2, 9, tzinfo=UTC)

    @classmethod
    def now(cls, tz: Any = None) -> "Calendar":
        cls.story += timedelta(seconds=1)
        return cls.fromisoformat(cls.story.astimezone(tz).isoformat())


def tell(shell: Shell, world: World, file: Path) -> None:
    """Five working days: three skills join, one wrecks the rest, and a version is taken back."""
    day = Calendar.story

    def by(actor: str, days: int) -> Shell:
        Calendar.story = day + timedelta(days=days)
        return Shell(shell.home, {"RESTITCH_ACTOR": actor})

    line = world.line(file, gates={"min_retention": 0.5}, localize={"density": 0.003})
    by("ann", 0)("init", line)
    by("ann", 0).add(world, "colour")
    by("bob", 1).add(world, "number")
    by("bob", 2).add(world, "wreck", code=5)
    by("ann", 3).add(world, "animal")
    by("bob", 4)("rollback", "demo", "2", "--reason", "animals are answered too slowly")


@pytest.fixture
def folder(
    new_home: NewHome, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """The folder with the home of the line, as the working directory."""
    import mlflow

    with monkeypatch.context() as patched:
        patched.setattr(Calendar, "story", Calendar.story)
        for module in (
            "restitch.registry.ledger.ledger",
            "restitch.flows.promotion.candidates",
            "restitch.flows.register",
        ):
            patched.setattr(f"{module}.datetime", Calendar)
        tell(new_home(".restitch"), world, tmp_path / "line.yaml")
    monkeypatch.chdir(tmp_path)
    with patch.dict(os.environ):  # where MLflow writes down the address
        yield tmp_path
        mlflow.set_tracking_uri(None)


def answers(page: str) -> list[tuple[str, str, str]]:
    """(code, expected output, actual output) of every block."""
    names: dict[str, Any] = {}
    found = []
    for code, expected in _BLOCK.findall(page):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, str(PAGE), "exec"), names)
        found.append((code, expected, out.getvalue()))
    return found


@pytest.mark.usefixtures("folder")
def test_the_queries_of_the_page_give_its_answers() -> None:
    page = PAGE.read_text(encoding="utf-8")
    found = answers(page)
    assert len(found) == page.count("```python"), "every block shows what it prints"
    for code, expected, printed in found:
        assert _VARIES.sub(" ", printed).strip() == _VARIES.sub(" ", expected).strip(), code
