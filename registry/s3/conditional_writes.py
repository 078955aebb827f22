"""Does a server keep conditional writes? Found out by trying, before anything relies on it.

A server that takes them for plain ones would let two writers each believe that their head
holds, and lose one of two registrations without a word. So a store is not written to through
such a server, unless the deployment promises a single writer (`RESTITCH_SINGLE_WRITER=1`).
What was found holds for this process, and as a mark in the local cache for those to come.
"""

import contextlib
import os
import threading
from pathlib import Path
from uuid import uuid4

from restitch.merging.digests import digest_json
from restitch.merging.errors import Unavailable
from restitch.registry.s3.client import client, code_of, s3_errors, status_of
from restitch.registry.s3.retries import with_retries
from restitch.registry.s3.settings import WRITER_VARIABLE, single_writer, write_settings

_known: dict[tuple[str, str], bool] = {}
_trying = threading.Lock()


def probe_conditional_writes(bucket: str, prefix: str) -> bool:
    """Try it: an object is created twice and swapped twice, and the second has to be refused.

    Raises:
        Unavailable: the server is away, or refuses the account.
    """
    # A name that no object of a store can have, and nobody else's.
    probe = {"Bucket": bucket, "Key": f"{prefix}/.probe-{uuid4().hex}"}
    with s3_errors(f"s3://{bucket}/{prefix}", "try conditional writes"):
        try:
            # A refusal alone proves nothing: it may be of a repetition whose first answer
            # was lost. What counts is what must be refused, and what is there.
            _write(probe, IfNoneMatch="*")
            if _write(probe, IfNoneMatch="*"):
                return False
            first = _etag(probe)
            if first is None:  # it does not even take a write with a condition
                return False
            _write(probe, IfMatch=first)
            return _etag(probe) != first and not _write(probe, IfMatch=first)
        finally:
            with contextlib.suppress(Exception):
                with_retries(lambda: client().delete_object(**probe))


def check_conditional_writes(bucket: str, prefix: str, cache: Path) -> bool:
    """Whether writes are conditional at this server; asked once and remembered.

    Returns:
        False where they are not and the deployment promises a single writer.

    Raises:
        Unavailable: they are not, and nobody promises anything.
    """
    server = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    place = (server, bucket)
    mark = cache / f".conditional-{digest_json(list(place))[:16]}"
    with _trying:
        if not _known.get(place):
            _known[place] = mark.exists() or probe_conditional_writes(bucket, prefix)
            if _known[place]:
                with contextlib.suppress(OSError):
                    cache.mkdir(parents=True, exist_ok=True)
                    mark.touch()
        known = _known[place]
    if not known and not single_writer():
        raise refusal(f"s3://{bucket}/{prefix}")
    return known


def refusal(place: str) -> Unavailable:
    """What is said of a server that keeps no conditions."""
    return Unavailable(
        f"the server of {place} ignores conditional writes",
        expected="If-None-Match and If-Match on PutObject: two registrations at once need them",
        found="the second of two writes took the place of the first",
        hint="use a server that knows them, or a newer version of this one; where one process "
        f"at a time writes, and you see to that, set {WRITER_VARIABLE}=1",
    )


def _write(probe: dict[str, str], **condition: str) -> bool:
    """Whether a write was taken; False also where the server knows no such condition."""
    from botocore.exceptions import ClientError

    try:
        with_retries(
            lambda: client().put_object(
                **probe, **condition, **write_settings(""), Body=uuid4().bytes
            )
        )
    except ClientError as error:
        if status_of(error) in (409, 412, 501) or code_of(error) == "NotImplemented":
            return False
        raise
    return True


def _etag(probe: dict[str, str]) -> str | None:
    from botocore.exceptions import ClientError

    try:
        return str(with_retries(lambda: client().head_object(**probe))["ETag"])
    except ClientError as error:
        if status_of(error) == 404:
            return None
        raise
