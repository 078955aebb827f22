"""Measure the peak memory that a piece of work adds to this process.

It counts anonymous pages (`RssAnon`), which are allocated memory, but not mapped files, whose pages
the system can reclaim. The kernel keeps no peak of anonymous pages, so they are sampled every few
milliseconds; shorter allocations are missed. Free memory of the allocator is returned to the system
first, because work that reuses it would not be counted.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from restitch.tasks.runtime.free_memory import release_freed

_STATUS = Path("/proc/self/status")
_INTERVAL_SECONDS = 0.003


class Peak:
    """The peak, `added` in bytes; None where the system does not report them."""

    added: int | None = None


@contextmanager
def memory_added() -> Iterator[Peak]:
    """Sample the memory of this process while the context is open."""
    peak, stop = Peak(), threading.Event()
    release_freed()
    before = _anonymous()

    def sample() -> None:
        now = _anonymous()
        if before is not None and now is not None:
            peak.added = max(peak.added or 0, now - before)

    def watch() -> None:
        while not stop.wait(_INTERVAL_SECONDS):
            sample()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
        sample()
    finally:
        stop.set()
        watcher.join()


def _anonymous() -> int | None:
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    rows = [line for line in lines if line.startswith("RssAnon:")]
    return int(rows[0].split()[1]) * 1024 if rows else None
