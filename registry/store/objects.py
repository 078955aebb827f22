"""Blobs by their digest, and keys that say which blob was made from which inputs.

A blob lies at `blobs/<digest of its bytes>`; a key `keys/<kind>/<digest of inputs>` is
published after its blob, and the first one published stays. Every read is verified against
the digest; a mismatch raises a `Damage` that names the object.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field, JsonValue, ValidationError

from restitch.merging.digests import canonical_json, digest_bytes, digest_file
from restitch.merging.errors import BadInput, Damage, Unavailable
from restitch.registry.record import Record
from restitch.registry.store.base import NotInStore, Store
from restitch.registry.store.deletion_notice import check_not_deleted
from restitch.registry.store.disk import explained

_REPAIR = "run `restitch verify --repair`; restore what it cannot repair from a backup"

Model = TypeVar("Model", bound=BaseModel)


class KeyRecord(Record):
    """The result that was made from some inputs.

    Attributes:
        blob: the digest of the result.
        size: its bytes.
        made_by: who or what made it: worker, host, device.
        fingerprint: the environment that is needed to make the same bytes again.
        facts: small values that belong to the result.
    """

    blob: str
    size: int
    made_by: JsonValue = None
    fingerprint: JsonValue = None
    facts: dict[str, JsonValue] = Field(default_factory=dict)


class ObjectStore:
    """The content-addressed side of a store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._verified: dict[str, tuple[int, ...]] = {}
        self._sizes: dict[str, int] = {}

    def put_blob(self, data: bytes | Path, *, move: bool = False, digest: str | None = None) -> str:
        """Store bytes or a file, and return the digest.

        Args:
            data: the content.
            move: take the file instead of copying it; see `Store.put`.
            digest: of a file to move, if its writer computed it from the same bytes in memory
                that it wrote. The file is not read then; every reader of the blob verifies it.
        """
        assert digest is None or move, "only the writer of a file knows its digest and moves it"
        if isinstance(data, bytes):
            digest = digest_bytes(data)
            self.store.put(_blob(digest), data)
            self._sizes[digest] = len(data)
            return digest
        try:
            with explained(data, "read"):
                before = _state(data)
                digest = digest or digest_file(data)
        except FileNotFoundError as error:
            raise BadInput(f"the file {data} does not exist") from error
        self.store.put(_blob(digest), data, move=move)
        if not move and _state(data) != before:
            raise BadInput(
                f"{data} changed while it was read",
                hint="run the command again when nobody writes to it",
            )
        self._sizes[digest] = before[2]
        return digest

    def put_json(self, value: object) -> str:
        """Store a JSON value in its canonical form."""
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
                actual = digest_file(path)
            if actual == digest:
                self._verified[digest] = state
                return path
        # Neither a local copy, if there was one, nor the object itself is intact.
        raise _altered(_blob(digest), actual)

    def publish(
        self,
        kind: str,
        inputs_digest: str,
        blob: str,
        made_by: JsonValue = None,
        fingerprint: JsonValue = None,
        facts: Mapping[str, Any] | None = None,
    ) -> KeyRecord:
        """Publish the key of a blob that is in the store and was made from these inputs.

        Returns:
            The record of the first publication, which may be another process's.

        Raises:
            Unavailable: `restitch gc` removed the blob meanwhile; the key is removed too.
        """
        record = KeyRecord(
            blob=blob,
            size=self._size(blob),
            made_by=made_by,
            fingerprint=fingerprint,
            facts=dict(facts or {}),
        )
        name = _key(kind, inputs_digest)
        created = self.store.put(name, canonical_json(record.to_json()))
        if not created:
            return self._record(name)
        try:
            check_not_deleted(self.store, {_blob(blob)})
        except Unavailable:
            # A key without its blob must not stay.
            self.store.remove(name)
            raise
        return record

    def lookup(self, kind: str, inputs_digest: str) -> KeyRecord | None:
        """The record of what was made from these inputs, or None.

        Raises:
            Damage: the record cannot be read.
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
            raise Damage(f"the key {name} cannot be read", hint=_REPAIR) from error


def verified(data: bytes, digest: str, name: str) -> bytes:
    """Check the digest of data and return them.

    Raises:
        Damage: they have another digest.
    """
    actual = digest_bytes(data)
    if actual != digest:
        raise _altered(name, actual)
    return data


def parsed(model: type[Model], data: bytes, name: str) -> Model:
    """Parse the content of an object.

    Raises:
        Damage: it is not a value of this model.
    """
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise Damage(
            f"the object {name} cannot be read",
            expected=f"a {model.__name__} as this version of restitch writes it",
            found=f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
            hint="restore it from a backup, or use the version of restitch that wrote it",
        ) from error


def _blob(digest: str) -> str:
    return f"blobs/{digest}"


def _key(kind: str, inputs_digest: str) -> str:
    return f"keys/{kind}/{inputs_digest}"


def _state(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _missing(digest: str) -> Damage:
    return Damage(f"the object {_blob(digest)} is missing from the store", hint=_REPAIR)


def _altered(name: str, actual: str) -> Damage:
    return Damage(
        f"the object {name} is damaged",
        expected=name.rpartition("/")[2],
        found=actual,
        hint=_REPAIR,
    )
