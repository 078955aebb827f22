"""Opening files of somebody else: regular ones only, and never more of them than expected.

A pipe would be waited for without an end, a device need have none: both are refused at
once, as an `OSError` like any file that cannot be read. Who allows a folder to be read can
have every file that is opened below it looked at once more (`watch`), by where it really is:
a link may have come since the folder was looked at.
"""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_watched: dict[Path, Callable[[Path], None]] = {}


def watch(folder: Path, check: Callable[[Path], None]) -> None:
    """Have whatever is opened in a folder checked, from now on and in all threads.

    Args:
        folder: it, or a file.
        check: is called with where an opened file really is, and raises where it may not be.
    """
    _watched[folder] = check


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read it.

    Raises:
        OSError: there is none, it may not be read, or it is a pipe, a device or a folder.
    """
    try:
        # Without this flag, opening a pipe waits for somebody who writes to it.
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
    """The bytes of a regular file; an `OSError` where it is larger than the limit."""
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit:,} bytes", str(path))
    return data


def _check(path: Path, descriptor: int) -> None:
    checks = [check for folder, check in tuple(_watched.items()) if path.is_relative_to(folder)]
    if checks:
        # Of what was opened: by its name another file may be there already.
        shown = Path(f"/proc/self/fd/{descriptor}")
        known = shown.readlink() if shown.parent.exists() else os.path.realpath(path)
        opened = Path(str(known).removesuffix(" (deleted)"))
        for check in checks:
            check(opened)
