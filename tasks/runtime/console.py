"""What steps tell the person or the log that watches them.

Steps call `working(title)` around long work and `say(...)` for one-line facts. The command
line installs a reporter that draws bars; a worker without one writes to the log. Nothing
here changes a result.
"""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Protocol

from restitch.merging.progress import Progress, ignore

log = logging.getLogger("restitch")


class Reporter(Protocol):
    """Where progress and facts go: bars for long work, lines for facts and warnings."""

    def working(self, title: str) -> AbstractContextManager[Progress]:
        """A bar for the length of the context."""

    def say(self, text: str) -> None:
        """One fact."""

    def warn(self, text: str) -> None:
        """One thing that the user should look at."""


class LogReporter:
    """Writes facts to the log and draws nothing."""

    @contextmanager
    def working(self, title: str) -> Iterator[Progress]:
        """No bar; the title goes to the log."""
        log.info("%s", title)
        yield ignore

    def say(self, text: str) -> None:
        """One line at level INFO."""
        log.info("%s", text)

    def warn(self, text: str) -> None:
        """One line at level WARNING."""
        log.warning("%s", text)


_current: ContextVar[Reporter] = ContextVar("reporter", default=LogReporter())  # noqa: B039


@contextmanager
def reporting_to(reporter: Reporter) -> Iterator[None]:
    """Send what steps report to `reporter` within the context."""
    token = _current.set(reporter)
    try:
        yield
    finally:
        _current.reset(token)


def working(title: str) -> AbstractContextManager[Progress]:
    """A progress for a piece of work that may take longer than two seconds."""
    return _current.get().working(title)


def say(text: str) -> None:
    """Report one fact."""
    _current.get().say(text)


def warn(text: str) -> None:
    """Report one thing that the user should look at."""
    _current.get().warn(text)
