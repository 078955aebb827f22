"""The terminal while a command works."""

import io
import time
from typing import Any

import pytest
from rich.console import Console

from restitch.cli.reporter import TerminalReporter
from restitch.registry.specs.in_words import changed
from restitch.tasks.runtime.console import reporting_to, say, warn, working


def terminal(quiet: bool) -> tuple[TerminalReporter, io.StringIO]:
    reporter = TerminalReporter(quiet)
    out = io.StringIO()
    reporter.console = Console(file=out, force_terminal=True, width=80, highlight=False)
    return reporter, out


def test_quiet_hides_facts_and_shows_warnings() -> None:
    for quiet in (False, True):
        reporter, out = terminal(quiet)
        with reporting_to(reporter):
            say("a fact [in brackets]")
            warn("a warning")
        assert ("a fact [in brackets]" in out.getvalue()) is not quiet
        assert "a warning" in out.getvalue()


def test_a_bar_appears_only_for_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("restitch.cli.reporter.SHOW_AFTER_SECONDS", 0.05)
    reporter, out = terminal(quiet=False)
    with reporting_to(reporter), working("quick work") as progress:
        progress(1, 1)
    assert "quick work" not in out.getvalue()
    with reporting_to(reporter), working("long work") as progress:
        time.sleep(0.06)
        progress(1, 2)
    assert "long work" in out.getvalue()


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        (None, 0.02, ["key: none -> 0.02"]),
        (["a"], ["a", "b"], ["key: a -> a, b"]),
        (None, {"x": 1, "y": {"z": True}}, ["key.x: none -> 1", "key.y.z: none -> True"]),
        ({"x": 1, "y": 2}, {"x": 1}, ["key.y: 2 -> none"]),
        ([], [{"name": "ties", "settings": {}}], ["key: none -> name=ties settings=none"]),
    ],
)
def test_changed_settings_are_shown_one_per_line(old: Any, new: Any, lines: list[str]) -> None:
    assert changed("key", old, new) == lines
