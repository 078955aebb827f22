"""A store in an S3 bucket, or in anything that speaks its protocol.

Objects are created and swapped by conditional writes, on which the server decides. Each
write carries a token of its own in the object's metadata: where an answer got lost and the
repetition is refused, the token says whether the object that is there is ours. What must
be a local file is downloaded whole into a cache before it has its name.
"""

import contextlib
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from merging.errors import BadInput, Unavailable
from registry.s3_client import ATTEMPTS, NOT_ALLOWED, client, code_of, s3_explained, status_of
from registry.store import NotInStore, Tagged, check_name, explained

Result = TypeVar("Result")

_TEMPORARY = ".tmp"
_TOKEN = "restitch-writer"

# Two conditional writes at once: the server may ask both to come again.
_CONFLICTS = 30

# S3 itself takes 5 GiB at once; a shorter request is answered, and repeated, sooner.
LARGEST_PUT = 1 << 30
PART = 64 << 20
_MOST_PARTS = 10_000
_BLOCK = 4 << 20


class _Found(NamedTuple):
    """What is there under a key."""

    etag: str
    token: str | None


class S3Store:
    """A store below a prefix of a bucket.

    Args:
        bucket: the bucket, which must be there.
        prefix: where in it the store lies; nothing else may lie there.
        cache: a folder for local copies. They are of objects that never change, so it may
            be emptied while nothing runs, and serves any number of processes.
    """

    def __init__(self, bucket: str, prefix: str, cache: Path) -> None:
        self.bucket = bucket
        self.prefix = prefix
        self.cache = cache

    def put(self, name: str, data: bytes | Path, *, move: bool = False) -> bool:
        """Create the object by a conditional write; see `Store.put`."""
        if not isinstance(data, Path):
            return self._write(name, data, IfNoneMatch="*") is not None
        if not data.is_file():
            raise BadInput(f"the file {data} is not there")
        # What is there already is not sent again, only to be refused at the end.
        there = self._head(name) is not None
        created = not there and self._write(name, data, IfNoneMatch="*") is not None
        if move:
            self._take(name, data, keep=created)
        return created

    def read(self, name: str) -> bytes:
        """The object's bytes; see `Store.read`."""
        return self.read_tagged(name).data

    def read_tagged(self, name: str) -> Tagged:
        """The object's bytes with its ETag; see `Store.read_tagged`."""
        return self._got(name, lambda answer: Tagged(answer["Body"].read(), str(answer["ETag"])))

    def swap(self, name: str, expected: str | None, data: bytes) -> str | None:
        """Replace the object if it is still the expected one; see `Store.swap`.

        Where an answer was lost and another writer has swapped since, this says that nothing
        was changed although it was, and is over already.
        """
        if expected is None:
            return self._write(name, data, IfNoneMatch="*")
        return self._write(name, data, IfMatch=expected)

    def local_path(self, name: str, *, fresh: bool = False) -> Path:
        """A copy in the cache, downloaded once; see `Store.local_path`."""
        path = self.cache / self._key(name)
        with explained(path, "write"):
            if path.is_file() and not fresh:
                return path
            with self._temporary() as temporary:
                self._got(name, lambda answer: _save(answer["Body"], temporary))
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary.replace(path)
        return path

    def list(self, prefix: str = "") -> Iterator[str]:
        """The names below a prefix, sorted; see `Store.list`."""
        below = self._key(prefix.rstrip("/")) + "/" if prefix else f"{self.prefix}/"
        keys: list[str] = []
        with s3_explained(self._place, "list"):
            pages = client().get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=below):
                keys.extend(str(each["Key"]) for each in page.get("Contents", ()))
        names = (key.removeprefix(f"{self.prefix}/") for key in keys)
        return iter(sorted(name for name in names if _is_name(name)))

    def sweep(self, older_than: float) -> int:
        """Remove halves of downloads and of uploads by age; see `Store.sweep`."""
        limit = time.time() - older_than
        removed = 0
        folder = self.cache / _TEMPORARY
        with explained(folder, "sweep"):
            for path in folder.glob("*"):
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_mtime < limit:
                        path.unlink()
                        removed += 1
        with s3_explained(self._place, "sweep"):
            for key, upload, since in self._uploads():
                if since < limit:
                    client().abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload)
                    removed += 1
        return removed

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{check_name(name)}"

    def _head(self, name: str) -> _Found | None:
        """What is there, without its content."""
        from botocore.exceptions import ClientError

        with s3_explained(self._place, f"look for {name}"):
            try:
                found = client().head_object(Bucket=self.bucket, Key=self._key(name))
            except ClientError as error:
                if status_of(error) == 404:
                    return None
                raise
        return _Found(str(found["ETag"]), found.get("Metadata", {}).get(_TOKEN))

    def _got(self, name: str, take: Callable[[Mapping[str, Any]], Result]) -> Result:
        """Take an object's content; begin again where the connection breaks on the way."""
        from botocore import exceptions

        broken = (
            exceptions.IncompleteReadError,
            exceptions.ResponseStreamingError,
            exceptions.ReadTimeoutError,
        )
        with s3_explained(self._place, f"read {name}"):
            for attempt in range(ATTEMPTS):
                try:
                    answer = client().get_object(Bucket=self.bucket, Key=self._key(name))
                except exceptions.ClientError as error:
                    if code_of(error) in ("NoSuchKey", "404"):
                        raise NotInStore(name) from None
                    raise
                try:
                    return take(answer)
                except broken:  # on the way, which boto3 does not repeat
                    if attempt == ATTEMPTS - 1:
                        raise
        raise AssertionError("the last attempt returns or raises")

    def _write(self, name: str, data: bytes | Path, **condition: str) -> str | None:
        """Write under a condition; the new ETag, or None where the condition does not hold."""
        from botocore.exceptions import ClientError

        key, token = self._key(name), uuid.uuid4().hex
        for attempt in range(_CONFLICTS):
            with s3_explained(self._place, f"write {name}"):
                try:
                    return self._send(key, data, {_TOKEN: token}, condition)
                except ClientError as error:
                    code, status = code_of(error), status_of(error)
                    lost = code == "NoSuchUpload"  # completed by a call whose answer was lost
                    if status == 412 or lost or code == "NoSuchKey":
                        found = self._head(name)
                        if found is not None and found.token == token:
                            return found.etag
                        if not lost:
                            return None
                        raise
                    if status != 409:
                        raise
            time.sleep(random.uniform(0, min(1.0, 0.01 * 2 ** min(attempt, 8))))
        raise Unavailable(
            f"cannot write {name} to {self._place}",
            found=f"{_CONFLICTS} conflicts with other writers",
            hint="run the same command again",
        )

    def _send(
        self, key: str, data: bytes | Path, metadata: dict[str, str], condition: dict[str, str]
    ) -> str:
        target = {"Bucket": self.bucket, "Key": key}
        if not isinstance(data, Path):
            answer = client().put_object(**target, Body=data, Metadata=metadata, **condition)
            return str(answer["ETag"])
        with explained(data, "read"):
            size = data.stat().st_size
            if size > LARGEST_PUT:
                return self._send_parts(target, data, size, metadata, condition)
            with data.open("rb") as body:
                answer = client().put_object(**target, Body=body, Metadata=metadata, **condition)
        return str(answer["ETag"])

    def _send_parts(
        self,
        target: dict[str, str],
        file: Path,
        size: int,
        metadata: dict[str, str],
        condition: dict[str, str],
    ) -> str:
        server = client()
        length = max(PART, -(-size // _MOST_PARTS))
        upload = server.create_multipart_upload(**target, Metadata=metadata)["UploadId"]
        parts: list[dict[str, Any]] = []
        try:
            with file.open("rb") as body:
                while block := body.read(length):
                    number = len(parts) + 1
                    answer = server.upload_part(
                        **target, UploadId=upload, PartNumber=number, Body=block
                    )
                    parts.append({"PartNumber": number, "ETag": answer["ETag"]})
            done = server.complete_multipart_upload(
                **target, UploadId=upload, MultipartUpload={"Parts": parts}, **condition
            )
        except BaseException:
            # Parts of an upload that nobody completes cost money until they are swept.
            with contextlib.suppress(Exception):
                server.abort_multipart_upload(**target, UploadId=upload)
            raise
        return str(done["ETag"])

    def _uploads(self) -> Iterator[tuple[str, str, float]]:
        """Uploads in parts that are not completed: key, id, when they began."""
        from botocore.exceptions import ClientError

        pages = client().get_paginator("list_multipart_uploads")
        try:
            for page in pages.paginate(Bucket=self.bucket, Prefix=f"{self.prefix}/"):
                for each in page.get("Uploads", ()):
                    yield str(each["Key"]), str(each["UploadId"]), each["Initiated"].timestamp()
        except ClientError as error:
            # Not every server lists them, and not every account may: both can do without.
            if code_of(error) not in (*NOT_ALLOWED, "NotImplemented", "MethodNotAllowed"):
                raise

    def _take(self, name: str, file: Path, *, keep: bool) -> None:
        """Take a file that was given away: what it holds need not be downloaded again."""
        path = self.cache / self._key(name)
        with explained(file, "remove"):
            if keep:
                with contextlib.suppress(OSError):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    file.replace(path)
            file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[Path]:
        folder = self.cache / _TEMPORARY
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / uuid.uuid4().hex
        try:
            yield path
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    @property
    def _place(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"


def _save(body: Any, file: Path) -> None:
    with file.open("wb") as out:
        for block in body.iter_chunks(_BLOCK):
            out.write(block)
        out.flush()
        os.fsync(out.fileno())


def _is_name(text: str) -> bool:
    try:
        check_name(text)
    except BadInput:
        return False
    return True
