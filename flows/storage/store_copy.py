"""Copy a store: all objects, then the states of the lines, which name the objects.

Line states are read first and written last: an interrupted copy has no line with missing objects,
and the copy of a store in use shows it as it was when the copy began. Objects that are named by
their digest are compared with it. Existing objects are not copied again, and none is replaced,
except a line's state by a newer state of the same line.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from restitch.flows.outcome import Outcome
from restitch.merging.digests import digest_bytes, digest_file
from restitch.merging.errors import BadInput, Damage
from restitch.registry.home import Home
from restitch.registry.ledger.ledger import Ledger, lines
from restitch.registry.ledger.line_state import LineState
from restitch.registry.mlflow.merged_models import IN_STORE
from restitch.registry.redaction import without_credentials
from restitch.registry.store.base import NotInStore, Store
from restitch.registry.store.folder import FolderStore
from restitch.registry.store.objects import ObjectStore
from restitch.tasks.runtime.console import warn, working
from restitch.tasks.runtime.workspace import workspace

_BY_DIGEST = re.compile(r"(blobs|audit)/([0-9a-f]{64})\Z")
_LINE_STATE = re.compile(r"lines/([^/]+)/head\.json\Z")
# Leases, offers of work and deletion notices mean nothing in another store; MLflow's models name
# this one.
_LEFT_OUT = ("leases/", "offers/", "gc/", f"{IN_STORE}/")

_THREADS = 4


@dataclass(frozen=True)
class CopyOutcome(Outcome):
    """The result of a copy.

    Attributes:
        there: the number of objects that the target had before.
        bytes: the size of the copied objects.
        lines: the lines that the target has now.
        moved_on: lines that changed in the source during the copy.
    """

    source: str
    target: str
    copied: int
    there: int
    bytes: int
    lines: tuple[str, ...]
    moved_on: tuple[str, ...]


def copy_store(source: str, target: str) -> CopyOutcome:
    """Copy a store into an empty one, or continue an interrupted copy.

    Either is a folder, or `s3://bucket/prefix`.

    Raises:
        BadInput: an address is invalid, the source has no line, or the target has other lines.
        Damage: an object of the source is damaged; all others were copied.
        Unavailable: a store cannot be reached.
    """
    if _same(source, target):
        raise BadInput("a store cannot be copied to itself", found=without_credentials(source))
    with workspace().scratch() as scratch:
        # The downloads of a store go to the scratch folder.
        stores = [Home(scratch, address).open_store() for address in (source, target)]
        return _Copy(*stores).run(without_credentials(source), without_credentials(target))


class _Copy:
    def __init__(self, source: Store, target: Store) -> None:
        self.source = source
        self.target = target

    def run(self, source: str, target: str) -> CopyOutcome:
        names = lines(ObjectStore(self.source))
        states = {line: self.source.read(_state_name(line)) for line in names}
        if not states:
            raise BadInput(
                f"there is no line in the store {source}",
                hint="name the store itself: RESTITCH_HOME/store or s3://bucket/prefix",
            )
        tags = {line: self._older_tag(line, data, target) for line, data in states.items()}
        there = set(self.target.list())
        listed = (name for name in self.source.list() if not name.startswith(_LEFT_OUT))
        objects = [name for name in listed if not _LINE_STATE.match(name)]
        sizes = self._copy_all(objects, there, target)
        for line, data in states.items():
            self._write_state(line, data, tags[line], target)
        copied = [size for size in sizes if size is not None]
        moved_on = [n for n, data in states.items() if self.source.read(_state_name(n)) != data]
        for line in moved_on:
            warn(f"{line} changed in the source during the copy: run the same command again")
        return CopyOutcome(
            source,
            target,
            copied=len(copied),
            there=len(objects) - len(copied),
            bytes=sum(copied),
            lines=tuple(sorted(states)),
            moved_on=tuple(sorted(moved_on)),
        )

    def _copy_all(self, names: list[str], there: set[str], target: str) -> list[int | None]:
        results: list[int | Damage | None] = []

        def copy(name: str) -> int | Damage | None:
            try:
                return self._copy(name, name in there, target)
            except Damage as error:
                return error

        title = f"copying {len(names)} objects"
        with working(title) as progress, ThreadPoolExecutor(_THREADS) as pool:
            try:
                for result in pool.map(copy, names):
                    results.append(result)
                    progress(len(results), len(names))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        damaged = [result.summary for result in results if isinstance(result, Damage)]
        if damaged:
            raise Damage(
                f"{len(damaged)} objects of the source are damaged; the copy has no lines yet",
                expected="an intact source; all other objects were copied",
                hint="run `restitch verify --deep --repair` on the source, then copy again",
                details=damaged[:20],
            )
        return [result for result in results if not isinstance(result, Damage)]

    def _copy(self, name: str, there: bool, target: str) -> int | None:
        """Copy one object; its size, or None if the target had it."""
        match = _BY_DIGEST.match(name)
        if match is None:
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
            _compare(name, digest_bytes(data), match[2])
            return len(data) if self.target.put(name, data) else None
        path = self.source.local_path(name)
        try:
            size = path.stat().st_size
            _compare(name, digest_file(path), match[2])
            return size if self.target.put(name, path) else None
        finally:
            if not isinstance(self.source, FolderStore):
                path.unlink(missing_ok=True)  # downloaded only for this copy

    def _older_tag(self, line: str, data: bytes, target: str) -> str | None:
        """The tag of the target's state of a line; None if it has none.

        Raises:
            BadInput: it is not an older state of the same line.
        """
        try:
            existing = self.target.read_tagged(_state_name(line))
        except NotInStore:
            return None
        entry = LineState.model_validate_json(existing.data).entry
        if existing.data == data or any(
            each.digest == entry for each in Ledger(ObjectStore(self.source), line).entries()
        ):
            return existing.tag
        raise _other(f"line {line}", target)

    def _write_state(self, line: str, data: bytes, tag: str | None, target: str) -> None:
        with suppress(NotInStore):
            if self.target.read(_state_name(line)) == data:
                return
        if self.target.swap(_state_name(line), tag, data) is None:
            raise _other(f"line {line}", target)


def _same(source: str, target: str) -> bool:
    first, second = (
        text if text.startswith("s3://") else os.path.realpath(text.removeprefix("file://"))
        for text in (source.rstrip("/"), target.rstrip("/"))
    )
    return first == second


def _state_name(line: str) -> str:
    return f"lines/{line}/head.json"


def _compare(name: str, digest: str, expected: str) -> None:
    if digest != expected:
        raise Damage(f"the object {name} is damaged", expected=expected, found=digest)


def _other(thing: str, target: str) -> BadInput:
    return BadInput(
        f"the store {target} holds a different {thing}",
        expected="an empty store, or an earlier copy of the same source",
        hint="copy into another folder or prefix",
    )
