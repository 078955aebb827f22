"""A read-through cache of files or folders, bounded in size and shared by processes.

A copy gets its name only when it is complete. Each process lists the copies that it uses in a
file that it keeps locked while it lives; a copy in use is never removed. Otherwise the least
recently used copies are removed when the cache exceeds its limit. The list of a process that
was killed is ignored.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from restitch.registry.store.disk import files_below, locked, sweep

# Names of objects never begin with a dot, so these folders can hold no copy.
_TEMPORARY, _USERS, _LOCK = ".tmp", ".users", ".lock"
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class ReadCache:
    """A folder of copies.

    Args:
        root: the folder; it may be emptied while nothing runs.
        limit: returns the bytes that it may hold, or None for no limit. Copies in use stay
            even above it.
        folders: each copy is a folder directly below the root, not a file at some depth.
    """

    def __init__(
        self, root: Path, limit: Callable[[], int | None], *, folders: bool = False
    ) -> None:
        self.root = root
        self.limit = limit
        self.folders = folders

    def get(self, name: str, fetch: Callable[[Path], None], *, fresh: bool = False) -> Path:
        """A copy, which stays unchanged for as long as this process lives.

        `fetch` writes the content to a new path, if there is no copy or with `fresh`.

        Raises:
            OSError: the disk refuses.
        """
        if fresh or not self.use(name):
            with self.temporary() as temporary:
                fetch(temporary)
                self.keep(name, temporary)
        return self.root / name

    def keep(self, name: str, made: Path) -> None:
        """Take a complete file or folder as a copy, and make room for it."""
        path = self.root / name
        with self._locked(fcntl.LOCK_SH):
            _mark_used(self.root, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                made.replace(path)
            except OSError:
                if not (self.folders and path.is_dir()):  # another process was first
                    raise
        self._make_room()

    def use(self, name: str) -> bool:
        """Mark a copy as used by this process; returns False if there is none."""
        path = self.root / name
        if not (path.is_dir() if self.folders else path.is_file()):
            return False
        try:
            with self._locked(fcntl.LOCK_SH):
                _mark_used(self.root, name)
                # The modification time stays: it shows that the content has not changed.
                os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        except FileNotFoundError:  # removed a moment ago to make room
            return False
        except OSError as error:
            if error.errno not in _READ_ONLY:  # on a read-only disk it is used without a mark
                raise
        return True

    def discard(self, name: str) -> None:
        """Remove a copy whose original was removed, even if a process uses it."""
        if (self.root / name).exists():
            with self._locked(fcntl.LOCK_EX), contextlib.suppress(FileNotFoundError):
                self._remove(name)

    @contextlib.contextmanager
    def temporary(self) -> Iterator[Path]:
        """A path for new content; what is left at it is removed afterwards."""
        folder = self.root / _TEMPORARY
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / uuid.uuid4().hex
        try:
            yield path
        finally:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def sweep(self, older_than: float) -> int:
        """Remove incomplete copies of this age in seconds; returns how many.

        Raises:
            OSError: the disk refuses.
        """
        return sweep((self.root / _TEMPORARY).glob("*"), older_than)

    def _make_room(self) -> None:
        limit = self.limit()
        if limit is None:
            return
        with self._locked(fcntl.LOCK_EX):
            copies = sorted(self._copies())
            excess = sum(size for _, _, size in copies) - limit
            used = _in_use(self.root) if excess > 0 else set()
            for _, name, size in copies:
                if excess > 0 and name not in used:
                    self._remove(name)
                    excess -= size

    def _remove(self, name: str) -> None:
        """Remove a copy in one step."""
        with self.temporary() as removed:
            (self.root / name).replace(removed)

    def _copies(self) -> Iterator[tuple[int, str, int]]:
        """Time of last use, name and size of each copy."""
        for path in self.root.glob("*") if self.folders else files_below(self.root):
            if not path.name.startswith("."):
                files = (each for each in (path, *path.rglob("*")) if each.is_file())
                size = sum(each.stat().st_size for each in files)
                yield path.stat().st_atime_ns, str(path.relative_to(self.root)), size

    @contextlib.contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        """Lock the cache: shared to use a copy, exclusive to remove copies."""
        self.root.mkdir(parents=True, exist_ok=True)
        with locked(self.root / _LOCK, how):
            yield


class _UseList:
    """The file that lists the copies that this process uses, locked while it lives."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.names: set[str] = set()
        self.path = folder / uuid.uuid4().hex
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(self.path, flags, 0o666)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def add(self, name: str) -> None:
        """Add a name, which contains no newline."""
        if name not in self.names:
            os.write(self._descriptor, f"{name}\n".encode())
            self.names.add(name)


_use_lists: dict[tuple[int, Path], _UseList] = {}
_marking = threading.Lock()


def _mark_used(root: Path, name: str) -> None:
    """Add a copy to the list of this process; the caller holds the lock of the cache."""
    key = (os.getpid(), root)
    with _marking:
        used = _use_lists.get(key)
        if used is None or not used.path.exists():  # the folder was emptied
            used = _use_lists[key] = _UseList(root / _USERS)
        used.add(name)


def _in_use(root: Path) -> set[str]:
    """The copies that living processes use; lists of dead ones are removed."""
    used: set[str] = set()
    for path in (root / _USERS).glob("*"):
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
            except BlockingIOError:
                used.update(file.read().splitlines())
    return used
