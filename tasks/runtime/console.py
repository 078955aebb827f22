"""Progress and messages of steps, for the terminal or the log.

Steps call `working(title)` around long work, and `say` or `warn` for one-line messages. The
command line installs a reporter that draws progress bars; the default writes to the log.
Reporters never change a result.
"""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

from restitch.merging.progress import Progress, ignore

log = logging.getLogger("restitch")


class Reporter:
    """Writes messages to the log and draws no progress bar; subclasses show them elsewhere."""

    @contextmanager
    def working(self, title: str) -> Iterator[Progress]:
        """Write the title to the log."""
        log.info("%s", title)
        yield ignore

    def say(self, text: str) -> None:
        """Write a line at level INFO."""
        log.info("%s", text)

    def warn(self, text: str) -> None:
        """Write a line at level WARNING."""
        log.warning("%s", text)


_current: ContextVar[Reporter] = ContextVar("reporter", default=Reporter())  # noqa: B039


@contextmanager
def reporting_to(reporter: Reporter) -> Iterator[None]:
    """Make `reporter` the reporter of all steps while the context is open."""
    token = _current.set(reporter)
    try:
        yield
    finally:
        _current.reset(token)


def working(title: str) -> AbstractContextManager[Progress]:
    """Report the progress of work that may take longer than two seconds."""
    return _current.get().working(title)


def say(text: str) -> None:
    """Show a message."""
    _current.get().say(text)


def warn(text: str) -> None:
    """Show a warning that needs the user's attention."""
    _current.get().warn(text)
