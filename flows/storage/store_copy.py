"""Move an installation from one store to another: all objects, then the heads that name them.

Heads are read first and written last, so that whatever a head names is there before it: a
copy that was killed has no head that lacks anything, and one of a store in use is as it was
when the copy began. Objects that are named by their digest are compared with it on their way;
what is there already is not copied again, and nothing that is there is ever replaced but a
head by a newer one of the same line.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from restitch.merging.digests import digest_bytes, digest_file
from restitch.merging.errors import BadInput, Damage
from restitch.registry.home import Home
from restitch.registry.ledger.ledger import Ledger, lines
from restitch.registry.ledger.line_state import LineState
from restitch.registry.mlflow.sync import without_credentials
from restitch.registry.store.base import NotInStore, Store
from restitch.registry.store.disk import explained
from restitch.registry.store.folder import FolderStore
from restitch.registry.store.objects import ObjectStore
from restitch.tasks.runtime.console import warn, working
from restitch.tasks.runtime.workspace import workspace

_BY_DIGEST = re.compile(r"(blobs|audit)/([0-9a-f]{64})\Z")
# What changes: heads; who has the turn on a server and what is removed mean nothing elsewhere.
_HEAD = re.compile(r"lines/([^/]+)/head\.json\Z")
_LEFT_OUT = ("leases/", "gc/")

_AT_ONCE = 4


@dataclass(frozen=True)
class CopyOutcome:
    """What was done.

    Attributes:
        copied: how many objects were not there yet.
        there: how many were.
        bytes: of those that were copied.
        lines: the lines whose heads are in the target now.
        moved_on: those of them that have changed in the source meanwhile.
    """

    source: str
    target: str
    copied: int
    there: int
    bytes: int
    lines: tuple[str, ...]
    moved_on: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def copy_store(source: str, target: str) -> CopyOutcome:
    """Copy a store into an empty one, or go on with a copy that was begun.

    Args:
        source: a folder, or `s3://bucket/prefix`.
        target: the same.

    Raises:
        BadInput: an address is none, the source has no line, or the target has others.
        Damage: an object of the source is not what its name says; all others are copied.
        Unavailable: a store is away.
    """
    home = workspace().home
    if _same(source, target):
        raise BadInput("a store cannot be copied to itself", found=without_credentials(source))
    with explained(home.scratch, "write"), TemporaryDirectory(dir=home.scratch) as scratch:
        copy = _Copy(_opened(source, Path(scratch)), _opened(target, Path(scratch)))
        return copy.run(without_credentials(source), without_credentials(target))


class _Copy:
    def __init__(self, source: Store, target: Store) -> None:
        self.source = source
        self.target = target

    def run(self, source: str, target: str) -> CopyOutcome:
        heads = {line: self.source.read(_head(line)) for line in lines(ObjectStore(self.source))}
        if not heads:
            raise BadInput(
                f"there is no line in the store {source}",
                hint="name the store itself, as RESTITCH_HOME/store or s3://bucket/prefix",
            )
        tags = {line: self._replaceable(line, data, target) for line, data in heads.items()}
        there = set(self.target.list())
        names = [name for name in self.source.list() if _is_copied(name)]
        sizes = self._copy_all(names, there, target)
        for line, data in heads.items():
            self._write_head(line, data, tags[line], target)
        copied = [size for size in sizes if size is not None]
        moved_on = [line for line, data in heads.items() if self.source.read(_head(line)) != data]
        for line in moved_on:
            warn(f"{line} has changed in the source while it was copied: copy it again")
        return CopyOutcome(
            source,
            target,
            copied=len(copied),
            there=len(names) - len(copied),
            bytes=sum(copied),
            lines=tuple(sorted(heads)),
            moved_on=tuple(sorted(moved_on)),
        )

    def _copy_all(self, names: list[str], there: set[str], target: str) -> list[int | None]:
        sizes: list[int | None] = []
        damaged: list[str] = []

        def copy(name: str) -> int | Damage | None:
            try:
                return self._copy(name, name in there, target)
            except Damage as error:
                return error

        title = f"copying {len(names)} objects"
        with working(title) as progress, ThreadPoolExecutor(_AT_ONCE) as pool:
            try:
                for done, found in enumerate(pool.map(copy, names), 1):
                    if isinstance(found, Damage):
                        damaged.append(found.summary)
                    else:
                        sizes.append(found)
                    progress(done, len(names))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if damaged:
            raise Damage(
                f"{len(damaged)} objects of the source are damaged; no head was written",
                hint="restitch verify says what they are; all others are copied",
                details=damaged[:20],
            )
        return sizes

    def _copy(self, name: str, there: bool, target: str) -> int | None:
        """Copy one object; its size, or None where it was there."""
        named = _BY_DIGEST.match(name)
        if named is None:
            data = self.source.read(name)
            if self.target.put(name, data):
                return len(data)
            if self.target.read(name) != data:
                raise _other(name, target)
            return None
        if there:
            return None
        if name.startswith("audit/"):
            data = self.source.read(name)
            _compare(name, digest_bytes(data), named[2])
            return len(data) if self.target.put(name, data) else None
        path = self.source.local_path(name)
        try:
            size = path.stat().st_size
            _compare(name, digest_file(path), named[2])
            return size if self.target.put(name, path) else None
        finally:
            if not isinstance(self.source, FolderStore):
                path.unlink(missing_ok=True)  # it was downloaded for this alone

    def _replaceable(self, line: str, data: bytes, target: str) -> str | None:
        """The tag of the target's head, which is an older one of the same line, or None."""
        try:
            found = self.target.read_tagged(_head(line))
        except NotInStore:
            return None
        entry = LineState.model_validate_json(found.data).entry
        if found.data == data or any(
            each.digest == entry for each in Ledger(ObjectStore(self.source), line).entries()
        ):
            return found.tag
        raise _other(f"line {line}", target)

    def _write_head(self, line: str, data: bytes, tag: str | None, target: str) -> None:
        try:
            if self.target.read(_head(line)) == data:
                return
        except NotInStore:
            pass
        if self.target.swap(_head(line), tag, data) is None:
            raise _other(f"line {line}", target)


def _opened(address: str, scratch: Path) -> Store:
    """The store at an address; what must be a local file of it lies in the scratch folder."""
    return Home(scratch, address).open_store()


def _same(source: str, target: str) -> bool:
    first, second = (
        text if text.startswith("s3://") else os.path.realpath(text.removeprefix("file://"))
        for text in (source.rstrip("/"), target.rstrip("/"))
    )
    return first == second


def _is_copied(name: str) -> bool:
    return not (_HEAD.match(name) or name.startswith(_LEFT_OUT))


def _head(line: str) -> str:
    return f"lines/{line}/head.json"


def _compare(name: str, found: str, expected: str) -> None:
    if found != expected:
        raise Damage(f"the object {name} is damaged", expected=expected, found=found)


def _other(what: str, target: str) -> BadInput:
    return BadInput(
        f"the store {target} holds another {what}",
        expected="an empty store, or a copy that was begun from the same one",
        hint="copy into another folder or prefix",
    )
