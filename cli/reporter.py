"""The terminal's reporter: bars for long work on standard error, one line per fact.

Results go to standard output and nothing else does, so `--json` can be piped. Bars appear
only on a terminal, and only when the work takes longer than two seconds.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from restitch.merging.progress import Progress as Callback

SHOW_AFTER_SECONDS = 2.0


class TerminalReporter:
    """Draws on standard error; silent about facts when `quiet`."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.quiet = quiet

    @contextmanager
    def working(self, title: str) -> Iterator[Callback]:
        """A bar that appears once the work has taken two seconds."""
        started = time.monotonic()
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        row = bar.add_task(title, total=None)
        shown = False

        def report(done: int, total: int) -> None:
            nonlocal shown
            if not shown and time.monotonic() - started > SHOW_AFTER_SECONDS:
                bar.start()
                shown = True
            bar.update(row, completed=done, total=total)

        try:
            yield report
        finally:
            if shown:
                bar.stop()

    def say(self, text: str) -> None:
        """One line on standard error."""
        if not self.quiet:
            self.console.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """One highlighted line on standard error, also when quiet."""
        self.console.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)
