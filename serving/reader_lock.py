"""A lock that many readers hold together, and a writer alone."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ReaderLock:
    """Readers share it; a writer waits for them, and new readers wait for a writer.

    A thread that reads may read again inside, also while a writer waits.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers = 0
        self._writing = False
        self._own = threading.local()

    @property
    def is_reading(self) -> bool:
        """True if this thread holds the lock as a reader."""
        return getattr(self._own, "depth", 0) > 0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Hold the lock together with other readers."""
        nested = self.is_reading
        if not nested:
            with self._changed:
                self._changed.wait_for(lambda: not self._writing)
                self._readers += 1
        self._own.depth = getattr(self._own, "depth", 0) + 1
        try:
            yield
        finally:
            self._own.depth -= 1
            if not nested:
                with self._changed:
                    self._readers -= 1
                    self._changed.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lock alone.

        Raises:
            RuntimeError: this thread reads, and would wait for itself.
        """
        if self.is_reading:
            raise RuntimeError("this thread reads the model, and would wait for itself")
        with self._changed:
            self._changed.wait_for(lambda: not self._writing)
            self._writing = True
            try:
                self._changed.wait_for(lambda: not self._readers)
            except BaseException:
                self._writing = False
                self._changed.notify_all()
                raise
        try:
            yield
        finally:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
