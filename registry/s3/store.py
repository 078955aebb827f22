"""A store in an S3 bucket, on any server that speaks the protocol.

Objects are created and swapped by conditional writes, on which the server decides. Each write
has its own token in the object's metadata, followed by the tokens of the swaps before it. If
the answer to a write is lost and the repetition is refused, the tokens tell whether the write
took effect, even if others followed. If too many followed to tell, the store raises an error.
Local files are downloaded into a cache and get their name when they are complete.
"""

import contextlib
import random
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from restitch.merging.digests import digest_file
from restitch.merging.errors import BadInput, Unavailable
from restitch.registry.s3.client import NOT_ALLOWED, client, code_of, s3_errors, status_of
from restitch.registry.s3.conditional_writes import check_conditional_writes
from restitch.registry.s3.retries import call, call_pages, pause, with_retries
from restitch.registry.s3.settings import cache_limit, write_settings
from restitch.registry.s3.transfer import Target, fetch_file, read_body, send_bytes, send_file
from restitch.registry.store.base import Listed, NotInStore, Tagged, check_name, is_name
from restitch.registry.store.disk import explained
from restitch.registry.store.read_cache import ReadCache

Result = TypeVar("Result")

_TOKEN = "restitch-writer"
# The number of tokens that an object keeps; with the digest they fit into the two kilobytes that
# metadata may have.
_REMEMBERED = 64

# Of two conditional writes at once, the server may ask both to try again.
_CONFLICTS = 30


class _ObjectState(NamedTuple):
    """The ETag of an object, and the tokens of its writers, newest first."""

    etag: str
    writers: tuple[str, ...]

    @property
    def tag(self) -> str:
        return " ".join((self.etag, *self.writers))

    def knows_all_since(self, writers: tuple[str, ...]) -> bool:
        """True if the tokens of all writes since these are known."""
        return writers[0] in self.writers if writers else len(self.writers) < _REMEMBERED


class S3Store:
    """A store below a prefix of a bucket.

    Args:
        bucket: the bucket, which must exist.
        prefix: the prefix of all its objects; nothing else may lie there.
        cache: a folder for local copies of objects that never change. Processes may share it,
            and it may be emptied while nothing runs.
    """

    def __init__(self, bucket: str, prefix: str, cache: Path) -> None:
        self.bucket = bucket
        self.prefix = prefix
        self.address = f"s3://{bucket}/{prefix}"
        self.cache = ReadCache(cache, cache_limit)

    def put(self, name: str, data: bytes | Path, *, move: bool = False) -> bool:
        """Create the object by a conditional write; see `Store.put`."""
        if not isinstance(data, Path):
            return self._write(name, data, None) is not None
        if not data.is_file():
            raise BadInput(f"the file {data} does not exist")
        # A large file is not sent only to be refused at the end.
        created = not self.exists(name) and self._write(name, data, None) is not None
        if move:
            self._take_file(name, data, into_cache=created)
        return created

    def read(self, name: str) -> bytes:
        """The object's bytes; see `Store.read`."""
        return self.read_tagged(name).data

    def read_tagged(self, name: str) -> Tagged:
        """The object's bytes with its ETag and its writers; see `Store.read_tagged`."""
        place = self._place(name)

        def read() -> Tagged:
            answer = client().get_object(**place)
            return Tagged(read_body(answer), _state_of(answer).tag)

        return self._read(name, lambda: with_retries(read))

    def swap(self, name: str, expected: str | None, data: bytes) -> str | None:
        """Replace the object if it is still the expected one; see `Store.swap`."""
        if expected is None:
            return self._write(name, data, None)
        etag, *writers = expected.split(" ")
        return self._write(name, data, _ObjectState(etag, tuple(writers)))

    def local_path(self, name: str, *, fresh: bool = False) -> Path:
        """A copy in the cache, downloaded once; see `Store.local_path`."""
        key, place = self._key(name), self._place(name)
        with explained(self.cache.root / key, "write"):
            return self.cache.get(
                key, lambda file: self._read(name, lambda: fetch_file(place, file)), fresh=fresh
            )

    def list(self, prefix: str = "") -> Iterator[str]:
        """The names below a prefix, sorted; see `Store.list`."""
        return (each.name for each in self.details(prefix))

    def sweep(self, older_than: float) -> int:
        """Remove incomplete downloads and uploads by age; see `Store.sweep`."""
        limit = time.time() - older_than
        with explained(self.cache.root, "sweep"):
            removed = self.cache.sweep(older_than)
        with s3_errors(self.address, "sweep"):
            for key, upload, since in self._uploads():
                if since < limit:
                    place = {"Bucket": self.bucket, "Key": key}
                    gone = ("NoSuchUpload",)
                    call("abort_multipart_upload", unless=gone, **place, UploadId=upload)
                    removed += 1
        return removed

    def details(self, prefix: str = "") -> Iterator[Listed]:
        """The objects below a prefix, sorted; see `Store.details`."""
        below = self._key(prefix.rstrip("/")) + "/" if prefix else f"{self.prefix}/"
        objects: list[Listed] = []
        with s3_errors(self.address, "list"):
            for page in call_pages("list_objects_v2", Bucket=self.bucket, Prefix=below):
                for each in page.get("Contents", ()):
                    name = str(each["Key"]).removeprefix(f"{self.prefix}/")
                    if is_name(name):
                        modified = each["LastModified"].timestamp()
                        objects.append(Listed(name, int(each["Size"]), modified))
        return iter(sorted(objects))

    def exists(self, name: str) -> bool:
        """True if the server has it; see `Store.exists`."""
        return self._head(name) is not None

    def digest(self, name: str) -> str:
        """The digest of a download that is not cached; see `Store.digest`."""
        place = self._place(name)
        with explained(self.cache.root, "write"), self.cache.temporary() as file:
            self._read(name, lambda: fetch_file(place, file))
            return digest_file(file)

    def mend(self, name: str, data: bytes | Path) -> None:
        """Write without a condition; see `Store.mend`."""
        metadata = {_TOKEN: uuid.uuid4().hex[:16]}
        with s3_errors(self.address, f"write {name}"):
            self._send(Target(self._place(name), metadata, write_settings(name), {}), data)

    def remove(self, name: str) -> bool:
        """Remove it from the server and from the cache; see `Store.remove`."""
        existed = self.exists(name)
        with s3_errors(self.address, f"remove {name}"):
            call("delete_object", **self._place(name))
        with explained(self.cache.root, "write"):
            self.cache.discard(self._key(name))
        return existed

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{check_name(name)}"

    def _place(self, name: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self._key(name)}

    def _head(self, name: str) -> _ObjectState | None:
        """The state of an object, or None if it does not exist."""
        with s3_errors(self.address, f"look for {name}"):
            answer = call("head_object", unless=(404,), **self._place(name))
        return None if answer is None else _state_of(answer)

    def _read(self, name: str, get: Callable[[], Result]) -> Result:
        """Call `get`, and explain its errors."""
        from botocore.exceptions import ClientError

        with s3_errors(self.address, f"read {name}"):
            try:
                return get()
            except ClientError as error:
                if code_of(error) in ("NoSuchKey", "404"):
                    raise NotInStore(name) from None
                raise

    def _write(self, name: str, data: bytes | Path, expected: _ObjectState | None) -> str | None:
        """Write if the object is in the expected state; returns the new tag, or None."""
        from botocore.exceptions import ClientError

        token = uuid.uuid4().hex[:16]
        before = expected.writers if expected else ()
        written = (token, *before)[:_REMEMBERED]
        condition = {"IfMatch": expected.etag} if expected else {"IfNoneMatch": "*"}
        place = self._place(name)
        if not check_conditional_writes(self.bucket, self.prefix, self.cache.root):
            # There is one writer, so the state does not change between this check and the write.
            present = self._head(name)
            if (present.etag if present else None) != (expected.etag if expected else None):
                return None
            condition = {}
        target = Target(place, {_TOKEN: " ".join(written)}, write_settings(name), condition)
        for attempt in range(_CONFLICTS):
            with s3_errors(self.address, f"write {name}"):
                try:
                    return _ObjectState(self._send(target, data), written).tag
                except ClientError as error:
                    code, status = code_of(error), status_of(error)
                    lost = code == "NoSuchUpload"  # an earlier call may have completed it
                    if status == 412 or lost or code == "NoSuchKey":
                        present = self._head(name)
                        if present is not None and token in present.writers:
                            ours = present.writers[0] == token
                            return present.tag if ours else _ObjectState("overtaken", written).tag
                        if lost:
                            raise
                        answer_lost = error.__cause__ is not None
                        if present is None or present.knows_all_since(before) or not answer_lost:
                            return None
                        raise self._unknown_outcome(name) from None
                    if status != 409:
                        raise
            pause(random.uniform(0, min(1.0, 0.01 * 2 ** min(attempt, 8))))
        raise Unavailable(
            f"cannot write {name} to {self.address}",
            found=f"conflicts with other writers in {_CONFLICTS} attempts",
            hint="run the same command again",
        )

    def _unknown_outcome(self, name: str) -> Unavailable:
        return Unavailable(
            f"cannot tell whether {name} was written to {self.address}",
            found=f"an unanswered request, and more than {_REMEMBERED} writes of others since",
            hint="run the same command again: it starts from the present content",
        )

    def _send(self, target: Target, data: bytes | Path) -> str:
        if not isinstance(data, Path):
            return send_bytes(target, data)
        with explained(data, "read"):
            return send_file(target, data)

    def _uploads(self) -> Iterator[tuple[str, str, float]]:
        """Key, id and start time of the multipart uploads that are not completed."""
        # Some servers do not list them, and some accounts may not; the sweep is optional.
        unless = (*NOT_ALLOWED, "NotImplemented", "MethodNotAllowed")
        place = {"Bucket": self.bucket, "Prefix": f"{self.prefix}/"}
        for page in call_pages("list_multipart_uploads", unless=unless, **place):
            for each in page.get("Uploads", ()):
                yield str(each["Key"]), str(each["UploadId"]), each["Initiated"].timestamp()

    def _take_file(self, name: str, file: Path, *, into_cache: bool) -> None:
        """Move an uploaded file into the cache, so that it is not downloaded again."""
        with explained(file, "remove"):
            if into_cache:
                with contextlib.suppress(OSError):
                    self.cache.keep(self._key(name), file)
            file.unlink(missing_ok=True)


def _state_of(answer: Any) -> _ObjectState:
    writers = answer.get("Metadata", {}).get(_TOKEN, "")
    return _ObjectState(str(answer["ETag"]), tuple(writers.split()))
