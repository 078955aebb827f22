"""The test whether an S3 server supports conditional writes, before anything relies on them.

A server that ignores the conditions would let two writers both succeed, and silently lose one
of two registrations. A store is not written to on such a server unless the deployment promises
a single writer (`RESTITCH_SINGLE_WRITER=1`). The result holds for the process; a positive one
is also marked in the local cache for later processes.
"""

import contextlib
import os
import threading
from pathlib import Path
from uuid import uuid4

from restitch.merging.digests import digest_json
from restitch.merging.errors import Unavailable
from restitch.registry.s3.client import s3_errors
from restitch.registry.s3.retries import call
from restitch.registry.s3.settings import WRITER_VARIABLE, single_writer, write_settings

_known: dict[tuple[str, str], bool] = {}
_probing = threading.Lock()


def probe_conditional_writes(bucket: str, prefix: str) -> bool:
    """Create and swap an object twice; returns True if the server refuses the second ones.

    Raises:
        Unavailable: the server is unreachable, or refuses the account.
    """
    # A unique name that no object of a store can have.
    probe = {"Bucket": bucket, "Key": f"{prefix}/.probe-{uuid4().hex}"}
    with s3_errors(f"s3://{bucket}/{prefix}", "try conditional writes"):
        try:
            # A refused write alone proves nothing: the answer to its first attempt may be lost.
            _write(probe, IfNoneMatch="*")
            if _write(probe, IfNoneMatch="*"):
                return False
            first = _etag(probe)
            if first is None:  # it refuses every conditional write
                return False
            _write(probe, IfMatch=first)
            return _etag(probe) != first and not _write(probe, IfMatch=first)
        finally:
            with contextlib.suppress(Exception):
                call("delete_object", **probe)


def check_conditional_writes(bucket: str, prefix: str, cache: Path) -> bool:
    """Return True if the server supports conditional writes; it is probed once.

    Raises:
        Unavailable: it does not, and the deployment does not promise a single writer.
    """
    server = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    place = (server, bucket)
    mark = cache / f".conditional-{digest_json(list(place))[:16]}"
    with _probing:
        if not _known.get(place):
            _known[place] = mark.exists() or probe_conditional_writes(bucket, prefix)
            if _known[place]:
                with contextlib.suppress(OSError):
                    cache.mkdir(parents=True, exist_ok=True)
                    mark.touch()
        supported = _known[place]
    if not supported and not single_writer():
        raise refusal(f"s3://{bucket}/{prefix}")
    return supported


def refusal(place: str) -> Unavailable:
    """The error for a server without conditional writes."""
    return Unavailable(
        f"the server of {place} ignores conditional writes",
        expected="support of If-None-Match and If-Match on PutObject, for concurrent writers",
        found="the second of two writes replaced the first",
        hint="use another server or a newer version of this one; if you make sure that only one "
        f"process writes at a time, set {WRITER_VARIABLE}=1",
    )


def _write(probe: dict[str, str], **condition: str) -> bool:
    """True if a write was accepted; False also if the server does not know the condition."""
    refused = (409, 412, 501, "NotImplemented")
    request = {**probe, **condition, **write_settings("")}
    return call("put_object", unless=refused, **request, Body=uuid4().bytes) is not None


def _etag(probe: dict[str, str]) -> str | None:
    answer = call("head_object", unless=(404,), **probe)
    return None if answer is None else str(answer["ETag"])
