"""Local copies of what lies elsewhere: read through, bounded in size, shared by processes.

A copy, a file or a folder of files, has its name only when it is whole. Each process notes,
in a file that it holds locked while it lives, which copies it has handed out; what a living
process has is never removed. Otherwise the least recently used goes first when there is more
than the limit. Whatever is killed when, a copy is whole or absent, and the notes of the dead
count for nothing.
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

# Names of objects never begin with a dot, so these folders can hold no copy.
_TEMPORARY, _USERS, _LOCK = ".tmp", ".users", ".lock"
_NOT_OURS = (errno.EROFS, errno.EACCES, errno.EPERM)


class ReadCache:
    """A folder of copies.

    Args:
        root: the folder; it may be emptied while nothing runs.
        limit: says how many bytes it may hold; None for any number. What is in use is kept
            even above it.
        folders: each copy is a folder below the root, and not a file at some depth.
    """

    def __init__(
        self, root: Path, limit: Callable[[], int | None], *, folders: bool = False
    ) -> None:
        self.root = root
        self.limit = limit
        self.folders = folders

    def get(self, name: str, fetch: Callable[[Path], None], *, fresh: bool = False) -> Path:
        """A copy, which is there and unchanged for as long as this process lives.

        Args:
            name: what it is a copy of; a path below the root.
            fetch: writes it to a new file.
            fresh: fetch it although there is a copy.

        Raises:
            OSError: the disk refuses.
        """
        path = self.root / name
        if not fresh and self.use(name):
            return path
        with self.temporary() as temporary:
            fetch(temporary)
            self.keep(name, temporary)
        return path

    def keep(self, name: str, made: Path) -> None:
        """Take what is whole as a copy, and make room for it."""
        path = self.root / name
        with self._locked(fcntl.LOCK_SH):
            _note(self.root, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                made.replace(path)
            except OSError:
                if not (self.folders and path.is_dir()):  # another was first, and its is as good
                    raise
        self._make_room()

    def use(self, name: str) -> bool:
        """Note that this process has a copy from now on, if there is one."""
        path = self.root / name
        if not (path.is_dir() if self.folders else path.is_file()):
            return False
        try:
            with self._locked(fcntl.LOCK_SH):
                _note(self.root, name)
                # The time of change stays: by it others know that the content did.
                os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        except FileNotFoundError:  # it had to make room a moment ago
            return False
        except OSError as error:
            if error.errno not in _NOT_OURS:  # where nothing can be noted, it is only read
                raise
        return True

    @contextlib.contextmanager
    def temporary(self) -> Iterator[Path]:
        """A name for something new, which is removed afterwards if it is still there."""
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

    def sweep(self, before: float) -> int:
        """Remove halves of copies that nobody has written to since then; how many.

        Raises:
            OSError: the disk refuses.
        """
        removed = 0
        for path in (self.root / _TEMPORARY).glob("*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < before:
                    path.unlink()
                    removed += 1
        return removed

    def _make_room(self) -> None:
        limit = self.limit()
        if limit is None:
            return
        with self._locked(fcntl.LOCK_EX):
            copies = sorted(self._copies())
            total = sum(size for _, _, size in copies)
            if total <= limit:
                return
            used = _in_use(self.root)
            for _, name, size in copies:
                if name not in used:
                    self._remove(self.root / name)
                    total -= size
                if total <= limit:
                    return

    def _remove(self, path: Path) -> None:
        """Remove a copy at once, as others see it."""
        with self.temporary() as gone:
            path.replace(gone)

    def _copies(self) -> Iterator[tuple[int, str, int]]:
        """When it was used last, name and size of each copy."""
        for folder, folders, files in os.walk(self.root):
            folders[:] = [each for each in folders if not each.startswith(".")]
            if self.folders:
                for each in folders:
                    inside = (path for path in Path(folder, each).rglob("*") if path.is_file())
                    size = sum(path.stat().st_size for path in inside)
                    yield Path(folder, each).stat().st_atime_ns, each, size
                return
            for file in files:
                if not file.startswith("."):
                    path = Path(folder, file)
                    found = path.stat()
                    yield found.st_atime_ns, str(path.relative_to(self.root)), found.st_size

    @contextlib.contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        """Shared by those who take copies, alone for who removes some."""
        self.root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, how)
            yield
        finally:
            os.close(descriptor)


class _Notes:
    """The file in which this process notes what it has, locked while it lives."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.names: set[str] = set()
        self.path = folder / uuid.uuid4().hex
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(self.path, flags, 0o666)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def add(self, name: str) -> None:
        """One more name; there is no newline in any."""
        if name not in self.names:
            os.write(self._descriptor, f"{name}\n".encode())
            self.names.add(name)


_notes: dict[tuple[int, Path], _Notes] = {}
_noting = threading.Lock()


def _note(root: Path, name: str) -> None:
    """Note in this process's file that it has a copy; the caller holds the folder's lock."""
    key = (os.getpid(), root)
    with _noting:
        notes = _notes.get(key)
        if notes is None or not notes.path.exists():  # somebody has emptied the folder
            notes = _notes[key] = _Notes(root / _USERS)
        notes.add(name)


def _in_use(root: Path) -> set[str]:
    """What living processes have; the notes of the dead are removed."""
    used: set[str] = set()
    for path in (root / _USERS).glob("*"):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
            except BlockingIOError:
                used.update(path.read_text().splitlines())
        finally:
            os.close(descriptor)
    return used
