"""Uploads and downloads of objects: in parts, in parallel, in bounded memory.

A few parts are in flight at once, each in a thread. Every request has a CRC32, which the server
compares if it supports that. The metadata of an object holds what its reader compares: the
digest of a small object, or short digests of the ranges of a large one, so that only an altered
range is fetched again.
"""

import base64
import contextlib
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from blake3 import blake3

from restitch.merging.digests import digest_bytes
from restitch.merging.errors import BadInput
from restitch.registry.s3.client import AlteredError, MangledError, client
from restitch.registry.s3.retries import BLOCK, call, read_blocks, with_retries

# Larger content is sent in parts of this size, IN_FLIGHT of them at once.
PART = 16 << 20
IN_FLIGHT = 4

DIGEST, RANGES = "restitch-digest", "restitch-ranges"

_MOST_PARTS = 10_000
# With four bytes each, the digests fit into the two kilobytes that metadata may have.
_MOST_RANGES, _SHORT = 256, 4


class Target(NamedTuple):
    """The destination of an upload.

    Attributes:
        place: bucket and key.
        metadata: the object's metadata.
        settings: further parameters of the call that begins the object.
        condition: the condition under which the server creates the object.
    """

    place: dict[str, str]
    metadata: dict[str, str]
    settings: dict[str, str]
    condition: dict[str, str]


def send_bytes(target: Target, data: bytes) -> str:
    """Write an object by one request; returns its ETag."""
    checked = _checked(data)

    def send() -> str:
        answer = client().put_object(
            **target.place,
            **target.settings,
            **target.condition,
            **checked,
            Body=data,
            Metadata={**target.metadata, DIGEST: digest_bytes(data)},
        )
        _compare(answer, checked)
        return str(answer["ETag"])

    return with_retries(send, len(data))


def send_file(target: Target, file: Path) -> str:
    """Write an object from a file, in parts if it is large; returns its ETag.

    Raises:
        BadInput: the file changed meanwhile; nothing was written.
    """
    with file.open("rb") as source:
        before = _state(source.fileno())
        size = before[0]
        if size <= PART:
            return send_bytes(target, source.read())
        ranges = _ranges_of(source.fileno(), size)
        with _upload(target, ranges) as upload:
            parts = _send_parts(target, upload, source.fileno(), size)
            if _state(source.fileno()) != before:
                raise BadInput(
                    f"{file} changed while it was read",
                    hint="run the command again when nobody writes to it",
                )
            return _complete(target, upload, parts)


def read_body(answer: Mapping[str, Any]) -> bytes:
    """The content of a small object.

    Raises:
        AlteredError: it is not what was written.
        MangledError: it was cut, or arrives too slowly.
        BotoCoreError: the connection broke.
    """
    blocks: list[bytes] = []
    read_blocks(answer["Body"], int(answer["ContentLength"]), blocks.append)
    data = b"".join(blocks)
    _compare_digest(answer, lambda: digest_bytes(data))
    return data


def fetch_file(place: dict[str, str], file: Path) -> None:
    """Download an object into a new file.

    The file is not synced: its digest reveals a copy that a power failure has torn.

    Raises:
        AlteredError: it is not what was written, at each attempt.
        BotoCoreError, ClientError, MangledError: it cannot be fetched.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        size, etag, metadata = with_retries(lambda: _begin(place, descriptor), PART)
        if size > PART:
            length, digests = _read_ranges(metadata, size)
            os.truncate(descriptor, size)
            in_parallel(
                lambda number: fetch_range(
                    {**place, "IfMatch": etag},
                    descriptor,
                    number * length,
                    min(length, size - number * length),
                    digests[number] if digests else None,
                ),
                range(-(-size // length)),
            )
    finally:
        os.close(descriptor)


def _begin(place: dict[str, str], descriptor: int) -> tuple[int, str, Mapping[str, str]]:
    """Request an object, and write its content if it is small."""
    answer = client().get_object(**place)
    size = int(answer["ContentLength"])
    if size > PART:
        answer["Body"].close()
    else:
        os.truncate(descriptor, 0)
        _compare_digest(answer, _receive(answer, descriptor, 0, size).hexdigest)
    return size, str(answer["ETag"]), answer.get("Metadata", {})


def fetch_range(
    place: dict[str, str], descriptor: int, start: int, length: int, expected: bytes | None
) -> None:
    """Fetch a range of an object to the same offset of a file; raises like `fetch_file`.

    If the short digest of the range is known, `expected`, the content is compared with it.
    """

    def fetch() -> None:
        answer = client().get_object(**place, Range=f"bytes={start}-{start + length - 1}")
        if int(answer["ContentLength"]) != length:
            answer["Body"].close()
            raise MangledError(f"{answer['ContentLength']} of {length} bytes arrived")
        hasher = _receive(answer, descriptor, start, length)
        if expected is not None and hasher.digest(_SHORT) != expected:
            raise AlteredError(f"altered bytes from {start} to {start + length}")

    with_retries(fetch, length)


def _receive(answer: Mapping[str, Any], descriptor: int, at: int, length: int) -> Any:
    """Write a body to an offset of a file; returns a hasher with its content."""
    hasher = blake3()

    def take(block: bytes) -> None:
        nonlocal at
        hasher.update(block)
        at += os.pwrite(descriptor, block, at)

    read_blocks(answer["Body"], length, take)
    return hasher


@contextlib.contextmanager
def _upload(target: Target, ranges: str) -> Iterator[str]:
    """The id of a multipart upload, which is aborted unless it is completed."""
    answer = call(
        "create_multipart_upload",
        **target.place,
        **target.settings,
        ChecksumAlgorithm="CRC32",
        Metadata={**target.metadata, RANGES: ranges},
    )
    upload = str(answer["UploadId"])
    try:
        yield upload
    except BaseException:
        # The parts of an abandoned upload cost money until they are swept.
        with contextlib.suppress(Exception):
            call("abort_multipart_upload", **target.place, UploadId=upload)
        raise


def _send_parts(target: Target, upload: str, descriptor: int, size: int) -> list[dict[str, Any]]:
    length = max(PART, -(-size // _MOST_PARTS))

    def send(index: int) -> dict[str, Any]:
        data = os.pread(descriptor, length, index * length)
        checked = _checked(data)

        def once() -> dict[str, Any]:
            answer = client().upload_part(
                **target.place, **checked, UploadId=upload, PartNumber=index + 1, Body=data
            )
            _compare(answer, checked)
            crc = {"ChecksumCRC32": checked["ChecksumCRC32"]}
            return {"PartNumber": index + 1, "ETag": answer["ETag"], **crc}

        return with_retries(once, len(data))

    return in_parallel(send, range(-(-size // length)))


def _complete(target: Target, upload: str, parts: list[dict[str, Any]]) -> str:
    request = {**target.place, **target.condition, "UploadId": upload}
    answer = call("complete_multipart_upload", **request, MultipartUpload={"Parts": parts})
    return str(answer["ETag"])


def in_parallel(do: Callable[[int], Any], numbers: Iterable[int]) -> list[Any]:
    """The results in order; after the first error nothing new is started."""
    with ThreadPoolExecutor(IN_FLIGHT, "s3") as pool:
        try:
            return list(pool.map(do, numbers))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _ranges_of(descriptor: int, size: int) -> str:
    """The metadata with the length of a file's ranges and their short digests."""
    length = max(PART, -(-size // (_MOST_RANGES * BLOCK)) * BLOCK)
    digests = bytearray()
    for start in range(0, size, length):
        digests += hash_range(blake3(), descriptor, start, length).digest(_SHORT)
    return f"{length} {base64.b64encode(digests).decode()}"


def hash_range(hasher: Any, descriptor: int, start: int, length: int) -> Any:
    """Update a hasher with a range of a file, or with what there is of it, and return it."""
    for at in range(start, start + length, BLOCK):
        hasher.update(os.pread(descriptor, min(BLOCK, start + length - at), at))
    return hasher


def _read_ranges(metadata: Mapping[str, str], size: int) -> tuple[int, list[bytes]]:
    """The length of the ranges and their short digests, from the metadata if they are there."""
    length, _, text = metadata.get(RANGES, "").partition(" ")
    with contextlib.suppress(ValueError):
        digests, each = base64.b64decode(text, validate=True), int(length)
        if each > 0 and len(digests) == -(-size // each) * _SHORT:
            at = range(0, len(digests), _SHORT)
            return each, [digests[start : start + _SHORT] for start in at]
    return PART, []


def _checked(data: bytes) -> dict[str, str]:
    crc = base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()
    return {"ChecksumAlgorithm": "CRC32", "ChecksumCRC32": crc}


def _compare(answer: Mapping[str, Any], checked: Mapping[str, str]) -> None:
    """Raise if the server computed another checksum than ours."""
    expected = checked["ChecksumCRC32"]
    if answer.get("ChecksumCRC32", expected) != expected:
        raise AlteredError(
            f"the server received the checksum {answer['ChecksumCRC32']}, not {expected}"
        )


def _compare_digest(answer: Mapping[str, Any], digest: Callable[[], str]) -> None:
    expected = answer.get("Metadata", {}).get(DIGEST)
    if expected is not None and digest() != expected:
        raise AlteredError(f"the digest {digest()}, not {expected}")


def _state(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns
