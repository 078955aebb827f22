"""A model's folder in a bucket, which is only read.

Its files are listed once with their ETags, and each range is requested with `If-Match`, so that
a file which changes meanwhile is an error and never a mixture. Small files are fetched whole;
weights either whole into the cache (`fetch`), or range by range into a sparse file without a
name (`RemoteWeights`), so that no other reader takes its holes for zeros. Calls are retried like
those to the store.
"""

import contextlib
import hashlib
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from blake3 import blake3

from restitch.merging.errors import BadInput, Unavailable, shortlist
from restitch.registry.ledger.references import S3_SCHEME
from restitch.registry.s3.client import BUCKET, NOT_ALLOWED, code_of, s3_errors, status_of
from restitch.registry.s3.retries import call, call_pages
from restitch.registry.s3.transfer import PART, fetch_file, fetch_range, hash_range, in_parallel

_MOST_SMALL = 1 << 28  # larger than any vocabulary or configuration
_MOST_FILES = 10_000
_MOST_READS = 4
_FIRST_READ = 64 << 10  # most headers are smaller
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
        address: the address that the user gave.
        files: by name.
    """

    address: str
    bucket: str
    files: Mapping[str, RemoteFile]

    def fetch(self, name: str, target: Path) -> None:
        """Fetch a whole file.

        Raises:
            BadInput: it has changed since it was listed.
            Unavailable: it cannot be fetched.
        """
        file = self.files[name]

        def fetch() -> str:
            with explained_source(self.address, name):
                fetch_file(self._request(file), target)
            if target.stat().st_size != file.size:
                raise changed(self.address, name)
            with target.open("rb") as opened:
                return self._etag(name, opened.fileno())

        self._fetch_until_stable(name, fetch)

    def fill_whole(self, name: str, descriptor: int) -> None:
        """Fetch all of a file into an open one; raises like `fetch`."""

        def fetch() -> str:
            self.fill(name, descriptor, 0, self.files[name].size)
            return self._etag(name, descriptor)

        self._fetch_until_stable(name, fetch)

    def _fetch_until_stable(self, name: str, fetch: Callable[[], str]) -> None:
        """Fetch until the content has the ETag of the listing, or two reads agree.

        The digest of the file is not known before it was read. On most servers an ETag is the
        MD5 of the content; on others two reads have to agree.
        """
        seen: set[str] = set()
        for _ in range(_MOST_READS):
            etag = fetch()
            if etag == self.files[name].etag.strip('"') or etag in seen:
                return
            seen.add(etag)
        raise Unavailable(
            f"{self.address}/{name} has other bytes each time that it is read",
            found=f"{len(seen)} different contents in {_MOST_READS} reads",
            hint="check the network and the server; use https if it is not in use",
        )

    def _etag(self, name: str, descriptor: int) -> str:
        """The ETag that most servers give to this content."""
        md5 = partial(hashlib.md5, usedforsecurity=False)
        file = self.files[name]
        parts = file.etag.strip('"').partition("-")[2]
        length = self._part_length(file) if parts else None
        if length is None:
            return str(hash_range(md5(), descriptor, 0, file.size).hexdigest())
        starts = range(0, file.size, length)
        each = [hash_range(md5(), descriptor, at, length).digest() for at in starts]
        return f"{md5(b''.join(each)).hexdigest()}-{len(each)}"

    def _part_length(self, file: RemoteFile) -> int | None:
        """The length of the parts in which an object was uploaded, if the server tells it."""
        from botocore.exceptions import ClientError

        with contextlib.suppress(ClientError):
            answer = call("head_object", Bucket=self.bucket, Key=file.key, PartNumber=1)
            return int(answer.get("ContentLength", 0)) or None
        return None

    def fill(self, name: str, descriptor: int, start: int, length: int) -> None:
        """Fetch a range of a file to the same offset of an open one; raises like `fetch`."""
        request = self._request(self.files[name])
        starts = range(start, start + length, PART)
        with explained_source(self.address, name):

            def part(at: int) -> None:
                fetch_range(request, descriptor, at, min(PART, start + length - at), None)

            in_parallel(part, starts)

    def _request(self, file: RemoteFile) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": file.key, "IfMatch": file.etag}


class RemoteWeights:
    """The safetensors of a folder in a bucket, fetched range by range.

    Attributes:
        files: local files by name, with the headers and holes for the rest. Their reader maps
            and unlinks them, so that they end with this process.
        fetched: the bytes that were fetched from the bucket.
    """

    def __init__(self, folder: S3Folder, names: list[str], scratch: Path) -> None:
        self.folder = folder
        self.files = {name: scratch / name for name in names}
        self.fetched = 0
        self._descriptors: dict[str, int] = {}
        self._counting = threading.Lock()
        # Mapped files can still be read when the descriptors are closed.
        opened = contextlib.ExitStack()
        weakref.finalize(self, opened.close)
        for name, path in self.files.items():
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._descriptors[name] = os.open(path, flags, 0o600)
            opened.callback(os.close, self._descriptors[name])
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
        """Write a range of a file from another source."""
        while data:
            done = os.pwrite(self._descriptors[name], data, start)
            start, data = start + done, data[done:]

    def digest(self, name: str, start: int, length: int) -> str:
        """The digest of a range of the local file."""
        return str(hash_range(blake3(), self._descriptors[name], start, length).hexdigest())

    def _fill_header(self, name: str) -> None:
        """Fetch the header of a file; its reader validates it."""
        # Imported here because it imports torch, which most commands do not need.
        from restitch.merging.files.mapped_file import MAX_HEADER

        size, descriptor = self.folder.files[name].size, self._descriptors[name]
        first = min(size, _FIRST_READ)
        if first:
            self.fill(name, 0, first)
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if first < 8 + length <= min(size, 8 + MAX_HEADER):
            self.fill(name, first, 8 + length - first)


def list_folder(address: str) -> S3Folder:
    """The files directly below an address, or the one file that it names.

    Raises:
        BadInput: the address is invalid, or nothing lies there.
        Unavailable: the server is unreachable, or refuses the credentials.
    """
    bucket, prefix = _parsed(address)
    with explained_source(address, ""):
        below = f"{prefix}/" if prefix else ""
        files = {key.removeprefix(below): file for key, file in _objects(bucket, below)}
        files = {name: file for name, file in files.items() if name and not _NO_NAME.search(name)}
        if not files and prefix.endswith(".safetensors"):
            one = dict(_objects(bucket, prefix))
            if prefix in one:
                files = {"model.safetensors": one[prefix]}
        folders = [] if files else _folders(bucket, below)
    if not files:
        raise BadInput(
            f"there is no model at {address}",
            expected="a folder with safetensors, such as s3://bucket/folder",
            found=f"folders below it: {shortlist(folders)}" if folders else "nothing below it",
            hint="name the folder of one of them"
            if folders
            else "check the bucket, the path and AWS_ENDPOINT_URL",
        )
    return S3Folder(address, bucket, dict(sorted(files.items())))


def check_small(folder: S3Folder, names: list[str]) -> None:
    """Refuse other files than weights that are larger than any real one.

    Raises:
        BadInput: a file is too large.
    """
    for name in names:
        if folder.files[name].size > _MOST_SMALL:
            raise BadInput(
                f"{folder.address}/{name} is too large",
                expected=f"at most {_MOST_SMALL:,} bytes of configuration or vocabulary",
                found=f"{folder.files[name].size:,} bytes",
                hint="remove the file from the folder if it does not belong to the model",
            )


def changed(address: str, name: str) -> BadInput:
    """The error for a folder that changes while it is read."""
    return BadInput(
        f"{address} changed while it was read",
        expected="a folder that nobody writes to",
        found=f"another content of {name}" if name else "other objects",
        hint="run the command again when the upload is complete; use one folder for each model",
    )


@contextlib.contextmanager
def explained_source(address: str, name: str) -> Iterator[None]:
    """Turn errors of the server into ones that name the model.

    Raises:
        BadInput: the bucket does not exist, or an object has changed.
        Unavailable: the server is unreachable, or refuses the credentials.
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
                    found="a bucket that does not exist",
                    hint="check the name of the bucket and AWS_ENDPOINT_URL",
                ) from None
            if name and (status_of(error) in (404, 412) or code == "NoSuchKey"):
                raise changed(address, name) from None
            if code in NOT_ALLOWED or status_of(error) == 403:
                raise Unavailable(
                    f"the model at {address} may not be read with these credentials",
                    found=f"{code} (HTTP {status_of(error)})",
                    hint="allow the account in AWS_ACCESS_KEY_ID of this process to list and read "
                    "there; the accounts of workers need it too",
                ) from None
            raise


def _parsed(address: str) -> tuple[str, str]:
    bucket, _, prefix = address.removeprefix(S3_SCHEME).partition("/")
    prefix = prefix.rstrip("/")
    if not BUCKET.match(bucket) or "\0" in prefix or len(prefix.encode("utf-8", "replace")) > 900:
        raise BadInput(
            "the address of the model is not valid",  # not repeated: it may hold a password
            expected="s3://bucket/folder",
            found="an invalid bucket or folder name",
            hint="the server goes into AWS_ENDPOINT_URL, credentials into AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY",
        )
    return bucket, prefix


def _folders(bucket: str, prefix: str) -> list[str]:
    """The names of the first folders directly below an address."""
    page = call("list_objects_v2", Bucket=bucket, Prefix=prefix, Delimiter="/")
    found = [str(each["Prefix"]) for each in page.get("CommonPrefixes", ())]
    return [name.removeprefix(prefix).rstrip("/") for name in found]


def _objects(bucket: str, prefix: str) -> Iterator[tuple[str, RemoteFile]]:
    seen = 0
    for page in call_pages("list_objects_v2", Bucket=bucket, Prefix=prefix, Delimiter="/"):
        for each in page.get("Contents", ()):
            key = str(each["Key"])
            yield key, RemoteFile(key, int(each["Size"]), str(each["ETag"]))
            seen += 1
        if seen > _MOST_FILES:
            raise BadInput(
                f"s3://{bucket}/{prefix} is not the folder of a model",
                expected=f"at most {_MOST_FILES} files",
                hint="name the folder that holds model.safetensors",
            )
