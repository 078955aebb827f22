"""Paths from a line or task file, a tag or a command.

Every invalid path (a NUL, a name that is too long, the home of an unknown user, a folder without
permission) raises a `BadInput`, never another error.
"""

import os
from pathlib import Path

from restitch.merging.errors import BadInput


def named_path(text: str, folder: Path | None = None, subject: str = "the path") -> Path:
    """The path that a text names, relative to a folder or to the working directory.

    Raises:
        BadInput: it is not a valid path.
    """
    try:
        path = Path(text).expanduser()
        path = path if folder is None or path.is_absolute() else folder / path
        os.fsencode(path)
    except (RuntimeError, ValueError) as error:
        raise _no_path(text, subject, str(error)) from error
    return path


def is_there(path: Path, subject: str = "the path") -> bool:
    """Return True if a path exists.

    Raises:
        BadInput: it is not a valid path, or there is no permission to look.
    """
    try:
        return path.exists()
    except (OSError, ValueError) as error:
        found = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise _no_path(str(path), subject, found) from error


def _no_path(text: str, subject: str, found: str) -> BadInput:
    shown = repr(text) if len(text) <= 200 else f"{text[:200]!r}..."
    return BadInput(
        f"{subject} {shown} is not a valid path",
        found=found,
        hint="check the spelling and the permissions",
    )
