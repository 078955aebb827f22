"""Safe opening of untrusted files: regular files only, with a limit on their size.

Opening a pipe could block forever and a device may have no end, so both raise an `OSError`
like any unreadable file. `watch` adds a check for every file that is opened below a folder.
It receives the real path, because a link may have appeared since the folder was checked.
"""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_watched: dict[Path, Callable[[Path], None]] = {}


def watch(folder: Path, check: Callable[[Path], None]) -> None:
    """Check every file that is opened in a folder, from now on and in all threads.

    Args:
        folder: the folder, or one file.
        check: called with the real path of an opened file; raises if it is not allowed.
    """
    _watched[folder] = check


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        OSError: the file is missing or unreadable, or is a pipe, a device or a folder.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError as error:  # a NUL in the path
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        try:
            _check(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_limited(path: Path, limit: int) -> bytes:
    """The bytes of a regular file; `OSError` if it is larger than the limit."""
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit:,} bytes", str(path))
    return data


def _check(path: Path, descriptor: int) -> None:
    checks = [check for folder, check in tuple(_watched.items()) if path.is_relative_to(folder)]
    if checks:
        # The path of the opened file itself: its name may refer to another file by now.
        shown = Path(f"/proc/self/fd/{descriptor}")
        known = shown.readlink() if shown.parent.exists() else os.path.realpath(path)
        opened = Path(str(known).removesuffix(" (deleted)"))
        for check in checks:
            check(opened)
