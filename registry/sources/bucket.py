"""A model's folder in a bucket, which belongs to somebody else: only ever read.

Its files are listed once, with their ETags, and each range is asked for by `If-Match`: what
was written to since is an error and never a mixture. Small files are fetched whole; weights
either whole into the cache (`fetch`), or range by range into a sparse file that has no name
(`RemoteWeights`), so that no reader can take the holes in it for zeros. Calls are repeated
like those to the store, with the credentials of the process.
"""

import contextlib
import hashlib
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from restitch.merging.errors import BadInput, Unavailable
from restitch.registry.ledger.references import S3_SCHEME
from restitch.registry.s3.client import (
    BUCKET,
    NOT_ALLOWED,
    client,
    code_of,
    s3_errors,
    status_of,
)
from restitch.registry.s3.retries import with_retries
from restitch.registry.s3.transfer import IN_FLIGHT, PART, fetch_file, fetch_range

# Larger than any vocabulary or configuration.
_BLOCK = 1 << 20
_MOST_SMALL = 1 << 28
_MOST_FILES = 10_000
_MOST_READS = 4
_FIRST_LOOK = 64 << 10  # most headers are smaller
_NO_NAME = re.compile(r"[\0/]")


@dataclass(frozen=True)
class RemoteFile:
    """One object of the folder, as it was when the folder was listed."""

    key: str
    size: int
    etag: str


@dataclass(frozen=True)
class S3Folder:
    """A folder in a bucket, as it was when it was listed.

    Attributes:
        address: as the user named it.
        files: by name.
    """

    address: str
    bucket: str
    files: Mapping[str, RemoteFile]

    @property
    def size(self) -> int:
        """The bytes of all files."""
        return sum(file.size for file in self.files.values())

    def fetch(self, name: str, target: Path) -> None:
        """Fetch a whole file.

        Raises:
            BadInput: it has changed since it was listed.
            Unavailable: it cannot be fetched.
        """
        file = self.files[name]

        def fetch() -> str:
            with explained_source(self.address, name):
                fetch_file(self._asked(file), target)
            if target.stat().st_size != file.size:
                raise changed(self.address, name)
            with target.open("rb") as opened:
                return self._etag(name, opened.fileno())

        self._agreed(name, fetch)

    def fill_whole(self, name: str, descriptor: int) -> None:
        """Fetch all of a file to another that is there; raises like `fetch`."""

        def fetch() -> str:
            self.fill(name, descriptor, 0, self.files[name].size)
            return self._etag(name, descriptor)

        self._agreed(name, fetch)

    def _agreed(self, name: str, fetch: Callable[[], str]) -> None:
        """Fetch until what came has the ETag of the listing, or comes the same twice.

        Nobody knows the digest of somebody else's file before it was read. At most servers an
        ETag is the content's MD5; where it is something else, two reads have to agree.
        """
        seen: set[str] = set()
        for _ in range(_MOST_READS):
            found = fetch()
            if found == self.files[name].etag.strip('"') or found in seen:
                return
            seen.add(found)
        raise Unavailable(
            f"{self.address}/{name} comes otherwise each time that it is read",
            found=f"{len(seen)} different contents",
            hint="look at the network and at the server; TLS would tell where it is altered",
        )

    def _etag(self, name: str, descriptor: int) -> str:
        """The ETag that most servers would give to a content."""
        file = self.files[name]
        parts = file.etag.strip('"').partition("-")[2]
        length = self._part_length(file) if parts else None
        if length is None:
            return _md5(descriptor, 0, file.size).hexdigest()
        starts = range(0, file.size, length)
        each = [_md5(descriptor, at, min(length, file.size - at)).digest() for at in starts]
        return f"{hashlib.md5(b''.join(each), usedforsecurity=False).hexdigest()}-{len(each)}"

    def _part_length(self, file: RemoteFile) -> int | None:
        """The length of the parts in which an object was sent, where the server says it."""
        from botocore.exceptions import ClientError

        place = {"Bucket": self.bucket, "Key": file.key}
        try:
            answer = with_retries(lambda: client().head_object(**place, PartNumber=1))
        except ClientError:
            return None
        return int(answer.get("ContentLength", 0)) or None

    def fill(self, name: str, descriptor: int, start: int, length: int) -> None:
        """Fetch a range of a file to the same place of another; raises like `fetch`."""
        asked = self._asked(self.files[name])
        starts = range(start, start + length, PART)
        with explained_source(self.address, name):

            def part(at: int) -> None:
                fetch_range(asked, descriptor, at, min(PART, start + length - at), None)

            if len(starts) == 1:
                part(start)
                return
            with ThreadPoolExecutor(IN_FLIGHT, "s3") as pool:
                list(pool.map(part, starts))

    def _asked(self, file: RemoteFile) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": file.key, "IfMatch": file.etag}


class RemoteWeights:
    """The safetensors of a folder in a bucket, of which only what is asked for is fetched.

    Attributes:
        files: local files by name with the headers in them and holes for the rest. Whoever
            has mapped them takes their names away, so that they go with this process.
        fetched: how many bytes came from the bucket.
    """

    def __init__(self, folder: S3Folder, names: list[str], scratch: Path) -> None:
        self.folder = folder
        self.files = {name: scratch / name for name in names}
        self.fetched = 0
        self._descriptors: dict[str, int] = {}
        self._counting = threading.Lock()
        # What is mapped can still be read when they are closed.
        weakref.finalize(self, _close, self._descriptors)
        for name, path in self.files.items():
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._descriptors[name] = os.open(path, flags, 0o600)
            os.truncate(path, folder.files[name].size)
            self._fill_header(name)

    def fill(self, name: str, start: int, length: int) -> None:
        """Fetch a range of a file."""
        self.folder.fill(name, self._descriptors[name], start, length)
        with self._counting:
            self.fetched += length

    def fill_whole(self, name: str) -> None:
        """Fetch all of a file."""
        self.folder.fill_whole(name, self._descriptors[name])
        with self._counting:
            self.fetched += self.folder.files[name].size

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Take a range of a file from elsewhere."""
        while data:
            done = os.pwrite(self._descriptors[name], data, start)
            start, data = start + done, data[done:]

    def digest(self, name: str, start: int, length: int) -> str:
        """The digest of a range of a file, as it is here."""
        hasher = blake3()
        for at in range(start, start + length, _BLOCK):
            block = min(_BLOCK, start + length - at)
            hasher.update(os.pread(self._descriptors[name], block, at))
        return hasher.hexdigest()

    def _fill_header(self, name: str) -> None:
        """The first bytes of a file; whether they are a header is for its reader to say."""
        from restitch.merging.files.header import (
            MAX_HEADER,  # with torch, which most commands do without
        )

        size, descriptor = self.folder.files[name].size, self._descriptors[name]
        look = min(size, _FIRST_LOOK)
        if look:
            self.fill(name, 0, look)
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if look < 8 + length <= min(size, 8 + MAX_HEADER):
            self.fill(name, look, 8 + length - look)


def _md5(descriptor: int, start: int, length: int) -> "hashlib._Hash":
    hasher = hashlib.md5(usedforsecurity=False)
    for at in range(start, start + length, _BLOCK):
        hasher.update(os.pread(descriptor, min(_BLOCK, start + length - at), at))
    return hasher


def _close(descriptors: dict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def list_folder(address: str) -> S3Folder:
    """The files directly below an address, or the one file that it names.

    Raises:
        BadInput: it is no address, or there is nothing.
        Unavailable: the server is away, or does not let these credentials look.
    """
    bucket, prefix = _parsed(address)
    with explained_source(address, ""):
        found = list(_objects(bucket, f"{prefix}/" if prefix else ""))
        files = {key.removeprefix(f"{prefix}/") if prefix else key: f for key, f in found}
        files = {name: file for name, file in files.items() if name and not _NO_NAME.search(name)}
        if not files and prefix.endswith(".safetensors"):
            one = dict(_objects(bucket, prefix))
            if prefix in one:
                files = {"model.safetensors": one[prefix]}
    if not files:
        raise BadInput(
            f"there is no model at {address}",
            expected="a folder with safetensors, as s3://bucket/folder",
            found="nothing below it",
            hint="check the bucket, the path and AWS_ENDPOINT_URL",
        )
    return S3Folder(address, bucket, dict(sorted(files.items())))


def check_small(folder: S3Folder, names: list[str]) -> None:
    """Refuse files beside the weights that are larger than any honest one.

    Raises:
        BadInput: one is.
    """
    for name in names:
        if folder.files[name].size > _MOST_SMALL:
            raise BadInput(
                f"{folder.address}/{name} is too large",
                expected=f"at most {_MOST_SMALL:,} bytes of configuration or vocabulary",
                found=f"{folder.files[name].size:,} bytes",
                hint="does it belong to this model?",
            )


def changed(address: str, name: str) -> BadInput:
    """What is said of a folder that somebody writes to while it is read."""
    return BadInput(
        f"{address} changed while it was read",
        expected="objects that nobody writes to",
        found=f"another {name}" if name else "other objects",
        hint="use it when it is whole; give each model a folder of its own",
    )


@contextlib.contextmanager
def explained_source(address: str, name: str) -> Iterator[None]:
    """Turn what a server says about somebody's model into errors that name it.

    Raises:
        BadInput: there is no such bucket, or an object has changed.
        Unavailable: the server is away, or refuses the credentials.
    """
    from botocore.exceptions import ClientError

    with s3_errors(address, f"read the model {address}"):
        try:
            yield
        except ClientError as error:
            code = code_of(error)
            if code == "NoSuchBucket":
                raise BadInput(
                    f"there is no model at {address}",
                    found="no such bucket",
                    hint="check the name of the bucket and AWS_ENDPOINT_URL",
                ) from None
            if name and (status_of(error) in (404, 412) or code == "NoSuchKey"):
                raise changed(address, name) from None
            if code in NOT_ALLOWED or status_of(error) == 403:
                raise Unavailable(
                    f"the model at {address} may not be read with these credentials",
                    found=f"{code} (HTTP {status_of(error)})",
                    hint="give the account that this process has in AWS_ACCESS_KEY_ID the right "
                    "to list and read there; workers have accounts of their own",
                ) from None
            raise


def _parsed(address: str) -> tuple[str, str]:
    bucket, _, prefix = address.removeprefix(S3_SCHEME).partition("/")
    prefix = prefix.rstrip("/")
    if not BUCKET.match(bucket) or "\0" in prefix or len(prefix.encode("utf-8", "replace")) > 900:
        raise BadInput(
            "the address of the model is not one",  # and may hold a password
            expected="s3://bucket/folder",
            found="something else in the place of the bucket or the folder",
            hint="the server goes into AWS_ENDPOINT_URL, credentials into AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY",
        )
    return bucket, prefix


def _objects(bucket: str, prefix: str) -> Iterator[tuple[str, RemoteFile]]:
    asked: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, "Delimiter": "/"}
    seen = 0
    while True:
        page = with_retries(lambda: client().list_objects_v2(**asked))
        for each in page.get("Contents", ()):
            key = str(each["Key"])
            yield key, RemoteFile(key, int(each["Size"]), str(each["ETag"]))
            seen += 1
        if seen > _MOST_FILES:
            raise BadInput(
                f"s3://{bucket}/{prefix} is no folder of a model",
                expected=f"at most {_MOST_FILES} files",
                hint="name the folder that holds model.safetensors",
            )
        if not page.get("IsTruncated"):
            return
        asked["ContinuationToken"] = page["NextContinuationToken"]
