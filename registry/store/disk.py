"""File operations of stores and caches: durable writes, locks, and errors with hints."""

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from restitch.merging.errors import Unavailable

_FICLONE = 0x40049409


@contextlib.contextmanager
def explained(path: Path, doing: str) -> Iterator[None]:
    """Turn errors of the operating system into ones that say what to do.

    The message begins with the verb, such as "write", and names the path if the error has none.

    Raises:
        Unavailable: no space, no permission, a read-only or failing disk.
    """
    try:
        yield
    except OSError as error:
        hints = {
            errno.ENOSPC: "free some disk space and run the same command again",
            errno.EDQUOT: "your disk quota is used up: free some space and run the command again",
            errno.EACCES: "give yourself permission for this path, or choose another folder",
            errno.EPERM: "give yourself permission for this path, or choose another folder",
            errno.EROFS: "the disk is mounted read-only: choose another folder",
            errno.ENOTDIR: "a file is in the way of a folder: move it, or choose another folder",
            errno.EEXIST: "a file is in the way of a folder: move it, or choose another folder",
        }
        raise Unavailable(
            f"cannot {doing} {error.filename or path}",
            found=error.strerror or type(error).__name__,
            hint=hints.get(error.errno or 0, "check the disk and run the same command again"),
        ) from error


def files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder that do not lie in a hidden one; none if it does not exist."""

    def refuse(error: OSError) -> None:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise error

    for directory, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(directory, name) for name in files)


def sweep(leftovers: Iterable[Path], older_than: float) -> int:
    """Remove files and folders in which nothing changed for some seconds; returns how many."""
    limit = time.time() - older_than
    removed = 0
    for path in leftovers:
        with contextlib.suppress(FileNotFoundError):
            # The time of a folder alone ignores growing files.
            if max(each.stat().st_mtime for each in (path, *path.rglob("*"))) < limit:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                removed += 1
    return removed


def write_durably(target: Path, data: bytes | Path) -> None:
    """Write a new file and sync it to the disk."""
    with target.open("xb") as out:
        if isinstance(data, Path):
            with data.open("rb") as source:
                try:
                    fcntl.ioctl(out.fileno(), _FICLONE, source.fileno())  # shares the blocks
                except OSError:
                    shutil.copyfileobj(source, out, 4 << 20)
        else:
            out.write(data)
        out.flush()
        os.fsync(out.fileno())


def sync(path: Path) -> None:
    """Sync a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Hold a `flock` on a lock file, whose folder exists; `how` is `LOCK_EX` or `LOCK_SH`.

    The kernel releases it when the process dies.
    """
    with path.open("a+b") as file:
        fcntl.flock(file, how)
        yield
