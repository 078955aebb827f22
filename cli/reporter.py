"""Report on standard error: bars for long work, one line per fact.

Only results go to standard output, so `--json` can be piped. Bars appear only on a terminal, after
two seconds of work.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from restitch.merging.progress import Progress as Callback
from restitch.tasks.runtime.console import Reporter

SHOW_AFTER_SECONDS = 2.0


class TerminalReporter(Reporter):
    """Writes to standard error; `quiet` hides facts."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.quiet = quiet

    @contextmanager
    def working(self, title: str) -> Iterator[Callback]:
        """Show a bar after two seconds of work."""
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

        def report(done: int, total: int) -> None:
            if not bar.live.is_started and time.monotonic() - started > SHOW_AFTER_SECONDS:
                bar.start()
            bar.update(row, completed=done, total=total)

        try:
            yield report
        finally:
            if bar.live.is_started:
                bar.stop()

    def say(self, text: str) -> None:
        """Print one line."""
        if not self.quiet:
            self.console.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print one highlighted line, also when quiet."""
        self.console.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)
