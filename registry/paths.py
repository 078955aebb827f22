"""Paths that somebody else wrote: in a line or task file, a tag, a command.

Whatever is no path of this machine (a NUL, a name longer than a disk takes, the home of a
user who does not exist, a folder that may not be entered) is a `BadInput`, never another
error.
"""

import os
from pathlib import Path

from restitch.merging.errors import BadInput


def named_path(text: str, folder: Path | None = None, what: str = "the path") -> Path:
    """The path that a text names, from a folder or from where the process is.

    Raises:
        BadInput: no path of this machine can be that.
    """
    try:
        path = Path(text).expanduser()
        path = path if folder is None or path.is_absolute() else folder / path
        os.fsencode(path)
    except (RuntimeError, ValueError) as error:
        raise _no_path(text, what, str(error)) from error
    return path


def is_there(path: Path, what: str = "the path") -> bool:
    """Whether something lies at a path.

    Raises:
        BadInput: it cannot be one, or may not be looked at.
    """
    try:
        return path.exists()
    except (OSError, ValueError) as error:
        found = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise _no_path(str(path), what, found) from error


def _no_path(text: str, what: str, found: str) -> BadInput:
    shown = repr(text) if len(text) <= 200 else f"{text[:200]!r}..."
    return BadInput(
        f"{what} {shown} can be no path here",
        found=found,
        hint="check the path and who may read it",
    )
