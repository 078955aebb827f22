"""The most memory of its own that a piece of work adds to this process.

Counted are anonymous pages (`RssAnon`): what was allocated, not the files that are mapped, whose
pages the system takes back when it needs them. The kernel keeps no peak of these, so they are
looked at every few milliseconds; what lives shorter than that is missed. What was free before is
given back first, so that the work does not live on it unseen.
"""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_STATUS = Path("/proc/self/status")
_EVERY = 0.003


class Peak:
    """What was seen.

    Attributes:
        added: bytes; None where the system does not tell.
    """

    added: int | None = None


@contextmanager
def memory_added() -> Iterator[Peak]:
    """Watch the memory of this process for the length of a block."""
    peak, stop = Peak(), threading.Event()
    with suppress(AttributeError, OSError):  # the C library has another allocator
        ctypes.CDLL(None).malloc_trim(0)
    before = _anonymous()

    def look() -> None:
        now = _anonymous()
        if before is not None and now is not None:
            peak.added = max(peak.added or 0, now - before)

    def watch() -> None:
        while not stop.wait(_EVERY):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
        look()
    finally:
        stop.set()
        watcher.join()


def _anonymous() -> int | None:
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line for line in lines if line.startswith("RssAnon:")]
    return int(found[0].split()[1]) * 1024 if found else None
