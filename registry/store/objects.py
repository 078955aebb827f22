"""Blobs by their digest, and keys that say which blob was made from which inputs.

A blob lies at `blobs/<digest of its bytes>`; a key `keys/<kind>/<digest of inputs>` is
published after its blob, and the first one published stays. Whatever is read is verified
against its digest: a `Damage` names the object, and nothing wrong is ever returned.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from restitch.merging.digests import canonical_json, digest_bytes, digest_file
from restitch.merging.errors import BadInput, Damage, Unavailable
from restitch.registry.store.base import NotInStore, Store
from restitch.registry.store.deletion_notice import check_not_deleted
from restitch.registry.store.disk import explained

_REPAIR = "restitch verify --repair makes again what can be; restore the rest from a backup"

Model = TypeVar("Model", bound=BaseModel)


class KeyRecord(BaseModel):
    """What was made from some inputs.

    Attributes:
        blob: the digest of the result.
        size: its bytes.
        made_by: who or what made it: worker, host, device.
        fingerprint: what a repetition must share to give the same bytes.
        facts: small findings that belong to the result.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    blob: str
    size: int
    made_by: JsonValue = None
    fingerprint: JsonValue = None
    facts: dict[str, JsonValue] = {}


class ObjectStore:
    """The content-addressed side of a store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._verified: dict[str, tuple[int, ...]] = {}
        self._sizes: dict[str, int] = {}

    def put_blob(self, data: bytes | Path, *, move: bool = False) -> str:
        """Keep bytes or a file; see `Store.put` for `move`.

        Returns:
            The digest under which it is found.
        """
        if isinstance(data, bytes):
            digest = digest_bytes(data)
            self.store.put(_blob(digest), data)
            self._sizes[digest] = len(data)
            return digest
        try:
            with explained(data, "read"):
                before = _state(data)
                digest = digest_file(data)
        except FileNotFoundError as error:
            raise BadInput(f"{data} is not there") from error
        self.store.put(_blob(digest), data, move=move)
        if not move and _state(data) != before:
            raise BadInput(f"{data} changed while it was read", hint="try again when it is whole")
        self._sizes[digest] = before[2]
        return digest

    def put_json(self, value: object) -> str:
        """Keep a JSON value in its canonical form."""
        return self.put_blob(canonical_json(value))

    def read_blob(self, digest: str) -> bytes:
        """The verified bytes of a blob.

        Raises:
            Damage: it is missing or altered.
        """
        try:
            data = self.store.read(_blob(digest))
        except NotInStore:
            raise _missing(digest) from None
        return verified(data, digest, _blob(digest))

    def blob_path(self, digest: str) -> Path:
        """A local file with the bytes of a blob, verified once while it stays unchanged.

        Raises:
            Damage: it is missing or altered.
        """
        for fresh in (False, True):
            try:
                path = self.store.local_path(_blob(digest), fresh=fresh)
            except NotInStore:
                raise _missing(digest) from None
            with explained(path, "read"):
                state = _state(path)
                if self._verified.get(digest) == state:
                    return path
                found = digest_file(path)
            if found == digest:
                self._verified[digest] = state
                return path
        # Neither a copy on this machine, if there was one, nor the object itself.
        raise _altered(_blob(digest), found)

    def publish(
        self,
        kind: str,
        inputs_digest: str,
        blob: str,
        made_by: JsonValue = None,
        fingerprint: JsonValue = None,
        facts: Mapping[str, Any] | None = None,
    ) -> KeyRecord:
        """Say that a blob, already kept, was made from these inputs.

        Returns:
            The record that holds now: the first that was published, ours or another's.

        Raises:
            Unavailable: the blob was removed meanwhile; there is no key either.
        """
        record = KeyRecord(
            blob=blob,
            size=self._size(blob),
            made_by=made_by,
            fingerprint=fingerprint,
            facts=dict(facts or {}),
        )
        name = _key(kind, inputs_digest)
        created = self.store.put(name, canonical_json(record.model_dump(mode="json")))
        if not created:
            return self._record(name)
        try:
            check_not_deleted(self.store, {_blob(blob)})
        except Unavailable:
            # `restitch gc` was faster: nobody may find a key that leads nowhere.
            self.store.remove(name)
            raise
        return record

    def lookup(self, kind: str, inputs_digest: str) -> KeyRecord | None:
        """What was made from these inputs, if anything was.

        Raises:
            Damage: the record is there and unreadable.
        """
        try:
            return self._record(_key(kind, inputs_digest))
        except NotInStore:
            return None

    def _size(self, digest: str) -> int:
        if digest not in self._sizes:
            self._sizes[digest] = self.blob_path(digest).stat().st_size
        return self._sizes[digest]

    def _record(self, name: str) -> KeyRecord:
        data = self.store.read(name)
        try:
            return KeyRecord.model_validate_json(data)
        except ValidationError as error:
            raise Damage(
                f"the key {name} is not readable",
                hint=_REPAIR,
            ) from error


def verified(data: bytes, digest: str, name: str) -> bytes:
    """The data itself.

    Raises:
        Damage: it has another digest.
    """
    found = digest_bytes(data)
    if found != digest:
        raise _altered(name, found)
    return data


def parsed(model: type[Model], data: bytes, name: str) -> Model:
    """The value that an object of this name holds.

    Raises:
        Damage: it holds something else.
    """
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise Damage(
            f"the object {name} is not readable",
            expected="what this version of restitch writes there",
            found=f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
            hint="restore it from a backup; if a newer restitch wrote it, use that one",
        ) from error


def _blob(digest: str) -> str:
    return f"blobs/{digest}"


def _key(kind: str, inputs_digest: str) -> str:
    return f"keys/{kind}/{inputs_digest}"


def _state(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _missing(digest: str) -> Damage:
    return Damage(
        f"the object {_blob(digest)} is missing from the store",
        hint=_REPAIR,
    )


def _altered(name: str, found: str) -> Damage:
    return Damage(
        f"the object {name} is damaged",
        expected=name.rpartition("/")[2],
        found=found,
        hint=_REPAIR,
    )
