"""The interface of a store: named objects that are written whole or not at all.

An object is created once (`put`) and never changes; the few that must change do so by
compare-and-swap (`swap`). A reader sees a whole object or none, even if a writer is killed.
`FolderStore` implements it in a POSIX folder, `S3Store` in a bucket. Names are checked, so
that none leaves its store.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from restitch.merging.errors import BadInput

_NAME_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\Z")
_MAX_PART, _MAX_NAME = 200, 900


class NotInStore(LookupError):  # noqa: N818
    """The store holds no object of this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} is not in the store")
        self.name = name


class Tagged(NamedTuple):
    """An object's bytes and the tag that `swap` compares."""

    data: bytes
    tag: str


class Listed(NamedTuple):
    """An object's name, its bytes, and when it was written, in seconds since the epoch."""

    name: str
    size: int
    modified: float


class Store(Protocol):
    """Atomic operations on objects that a folder and an S3 bucket both support.

    Raises:
        BadInput: the name is invalid (any method).
        Unavailable: the disk or the server cannot be used now (any method).

    Attributes:
        address: the folder or `s3://bucket/prefix`, for messages.
    """

    address: str

    def put(self, name: str, data: bytes | Path, *, move: bool = False) -> bool:
        """Create the object durably from bytes or a file.

        Args:
            name: the object's name.
            data: the content. A file is copied and stays unchanged.
            move: take the file instead of copying it. The file is gone afterwards, and
                nobody may write to it any more.

        Returns:
            True if the object was created; False if one of this name already exists, which
            stays unchanged.
        """
        ...

    def read(self, name: str) -> bytes:
        """The object's bytes.

        Raises:
            NotInStore: it does not exist.
        """
        ...

    def read_tagged(self, name: str) -> Tagged:
        """The object's bytes with the tag for `swap`.

        Raises:
            NotInStore: it does not exist.
        """
        ...

    def swap(self, name: str, expected: str | None, data: bytes) -> str | None:
        """Replace the object if it still has the expected tag; None expects no object.

        Returns:
            The new tag; None if the object has changed, in which case nothing is written.
        """
        ...

    def local_path(self, name: str, *, fresh: bool = False) -> Path:
        """A read-only local file with the content of an object that is never swapped.

        With `fresh` it is downloaded again although this machine has a copy, which is damaged.

        Raises:
            NotInStore: it does not exist.
        """
        ...

    def list(self, prefix: str = "") -> Iterator[str]:
        """The names of all objects below a prefix of whole parts, sorted."""
        ...

    def sweep(self, older_than: float) -> int:
        """Remove leftovers of killed writers from an age in seconds; returns how many."""
        ...

    def details(self, prefix: str = "") -> Iterator[Listed]:
        """All objects below a prefix of whole parts, sorted by name."""
        ...

    def exists(self, name: str) -> bool:
        """True if the store holds the object now; local copies do not count."""
        ...

    def digest(self, name: str) -> str:
        """The digest of what the store itself holds, never of a local copy.

        Raises:
            NotInStore: it does not exist.
            Damage: the server holds something else than was written.
        """
        ...

    def mend(self, name: str, data: bytes | Path) -> None:
        """Replace a damaged or missing object atomically.

        The caller has checked that the name is the digest of the content.
        """
        ...

    def remove(self, name: str) -> bool:
        """Remove an object, and this machine's copy of it; returns True if it existed."""
        ...


def is_name(text: str) -> bool:
    """True if an object may have this name."""
    return len(text) <= _MAX_NAME and all(
        len(part) <= _MAX_PART and _NAME_PART.match(part) for part in text.split("/")
    )


def check_name(name: str) -> str:
    """Check the name of an object and return it.

    Raises:
        BadInput: it is not made of `[A-Za-z0-9._-]` parts, or could leave its prefix.
    """
    if is_name(name):
        return name
    raise BadInput(
        f"{name[:200]!r} is not a valid name for an object in the store",
        expected="parts of letters, digits, '.', '_' and '-', separated by single slashes; "
        "no part begins with '.'",
    )
