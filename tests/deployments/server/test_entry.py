"""A worker's run finds its line, even if its schedule has lost the parameters."""

from pathlib import Path
from typing import Any

import pytest

from restitch.deployments.server import entry
from restitch.deployments.server.definitions import line_of_slug, slug_of
from restitch.flows import remerge
from restitch.merging.errors import BadInput
from tests.shell import Shell


@pytest.fixture
def merged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The lines that runs would have merged."""
    found: list[Any] = []
    monkeypatch.setenv("RESTITCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(remerge.remerge, "body", lambda line, force: found.append((line, force)))
    return found


def test_a_run_merges_the_line_of_its_parameter(merged: list[Any]) -> None:
    entry.remerge.body("photos", force=True)
    assert merged == [("photos", True)]


@pytest.mark.parametrize("paused", [False, True])
def test_a_run_without_a_parameter_merges_the_line_of_its_schedule(
    merged: list[Any], monkeypatch: pytest.MonkeyPatch, paused: bool
) -> None:
    monkeypatch.setattr(entry, "scheduled_by", lambda: slug_of("photos", paused=paused))
    entry.remerge.body()
    assert merged == [("photos", False)]


def test_a_run_of_nobody_is_refused(tmp_path: Path) -> None:
    with Shell(tmp_path).inside(), pytest.raises(BadInput, match="the run names no line"):
        entry.remerge.body()


@pytest.mark.parametrize("paused", [False, True])
def test_a_slug_names_its_line(paused: bool) -> None:
    assert line_of_slug(slug_of("photos-paused", paused=paused)) == "photos-paused"
