"""Named objects that are written whole or not at all.

An object is created once (`put`) and never changes; the few that must change do so by
compare-and-swap (`swap`). A reader sees a whole object or none, whatever is killed when.
`Store` is the whole surface (`registry/s3/store.py` keeps it in a bucket); `FolderStore`
keeps it in a folder of a POSIX file system, where writers in other processes and on other
mounts of it are safe as far as `link`, `rename` and `flock` are. Names are checked, so that
none leaves its store.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from restitch.merging.errors import BadInput

NAME_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\Z")
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
    """What a folder and an S3 bucket can both do atomically, and the upkeep of what they hold.

    Raises:
        BadInput: the name is not one (any method).
        Unavailable: the disk or the server cannot be used now (any method).

    Attributes:
        address: the folder or `s3://bucket/prefix`, for messages.
    """

    address: str

    def put(self, name: str, data: bytes | Path, *, move: bool = False) -> bool:
        """Create the object durably from bytes or a file.

        Args:
            name: the object's name.
            data: the content. A file is copied and left as it is.
            move: the file is the caller's to give away: it may be taken instead of
                copied, and is gone when this returns. Nobody may write to it any more.

        Returns:
            Whether it was created; False where one of this name was already there, which
            is then left as it is.
        """
        ...

    def read(self, name: str) -> bytes:
        """The object's bytes.

        Raises:
            NotInStore: there is none.
        """
        ...

    def read_tagged(self, name: str) -> Tagged:
        """The object's bytes with the tag for `swap`.

        Raises:
            NotInStore: there is none.
        """
        ...

    def swap(self, name: str, expected: str | None, data: bytes) -> str | None:
        """Replace the object if it is still the expected one.

        Args:
            name: the object's name.
            expected: the tag that was read; None for "there is none".
            data: the new content.

        Returns:
            The new tag; None where somebody else was first, and nothing changed.
        """
        ...

    def local_path(self, name: str, *, fresh: bool = False) -> Path:
        """A local file with the content of an object that is never swapped, to be read only.

        Args:
            name: the object's name.
            fresh: fetch it anew where this machine has a copy: that one is damaged.

        Raises:
            NotInStore: there is none.
        """
        ...

    def list(self, prefix: str = "") -> Iterator[str]:
        """The names of all objects below a prefix of whole parts, sorted."""
        ...

    def sweep(self, older_than: float) -> int:
        """Remove what killed writers left behind more than so many seconds ago.

        Returns:
            How many leftovers were removed.
        """
        ...

    def details(self, prefix: str = "") -> Iterator[Listed]:
        """All objects below a prefix of whole parts, sorted by name."""
        ...

    def exists(self, name: str) -> bool:
        """Whether the object is there now, whatever this machine has a copy of."""
        ...

    def digest(self, name: str) -> str:
        """The digest of what the store itself holds, never of a copy on this machine.

        Raises:
            NotInStore: there is none.
            Damage: the server says that it holds something else than was written.
        """
        ...

    def mend(self, name: str, data: bytes | Path) -> None:
        """Put content in the place of a damaged object, or of one that is gone, at once.

        The caller has made sure that the name is the digest of the content.
        """
        ...

    def remove(self, name: str) -> bool:
        """Remove an object; whether it was there."""
        ...


def check_name(name: str) -> str:
    """The name itself.

    Raises:
        BadInput: it is not made of `[A-Za-z0-9._-]` parts or could leave its prefix.
    """
    parts = name.split("/")
    if len(name) <= _MAX_NAME and all(
        len(part) <= _MAX_PART and NAME_PART.match(part) for part in parts
    ):
        return name
    raise BadInput(
        f"{name[:200]!r} cannot name an object of the store",
        expected="parts of letters, digits, '.', '_' and '-', not beginning with '.', "
        "separated by single slashes",
    )
