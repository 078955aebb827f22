"""Retries of calls to an S3 server.

boto3's own retries are off, because they cover neither the body of an answer nor requests that
were altered on their way. Faults of the network or of a server under load (an error 5xx, a
closed connection, a body that is cut, altered or endless) are retried after a random, growing
pause; a server's decision is not. The last error is raised, and `s3.client.s3_errors` explains
it.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Container, Iterator
from typing import Any, TypeVar

from restitch.registry.s3.client import AlteredError, MangledError, client, code_of, status_of

Result = TypeVar("Result")

# An unreachable server is reported after a few seconds, while a server that fails every third call
# is still used. Content that is altered every time is damaged at the server. No attempt begins
# after the deadline, in seconds.
ATTEMPTS = 8
ATTEMPTS_UNREACHABLE = ATTEMPTS_ALTERED = 4
DEADLINE = 30.0
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 5.0

# A body that arrives more slowly than this, in bytes per second, counts as endless.
SLOWEST = 128 << 10
_GRACE = 15.0

BLOCK = 1 << 20

# The parameters that name the next page of a list.
_MARKS = {
    "list_objects_v2": ("ContinuationToken",),
    "list_multipart_uploads": ("KeyMarker", "UploadIdMarker"),
}

_BUSY = (429, 500, 502, 503, 504)

# Refusals of calls that were cut or altered on their way, or came too early.
_TRANSIENT = {
    *("RequestTimeout", "RequestTimeTooSkewed", "SlowDown", "Throttling", "ThrottlingException"),
    *("TooManyRequests", "InternalError", "ServiceUnavailable", "BadDigest", "IncompleteBody"),
    *("XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "OperationAborted"),
}


def with_retries(call: Callable[[], Result], size: int = 0) -> Result:
    """Make a call that is safe to repeat, and repeat it while that may help.

    It gets more time for `size`, the bytes that it moves.

    Raises:
        BotoCoreError, ClientError, MangledError: the error of the last attempt. Its cause is
            the failure before it, if any: that attempt may have taken effect.
    """
    from botocore import exceptions, parsers

    failures = (
        *(exceptions.BotoCoreError, exceptions.ClientError),
        *(parsers.ResponseParserError, MangledError),
    )
    ends = time.monotonic() + DEADLINE + size / SLOWEST
    attempt, previous = 0, None
    # Failures by their limit: content altered once, after some network failures, is fetched again.
    failed: Counter[int] = Counter()
    while True:
        attempt += 1
        try:
            return call()
        except failures as error:
            limit = _attempts(error)
            failed[limit] += 1
            wait = random.uniform(0, min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt))
            exhausted = failed[limit] >= limit or attempt >= ATTEMPTS
            if exhausted or time.monotonic() + wait > ends:
                raise error from previous
            previous = error
        pause(wait)


def call(operation: str, *, unless: Container[str | int] = (), **parameters: Any) -> Any:
    """Call an operation of boto3's client; raises like `with_retries`.

    Returns:
        The answer; None if the server refuses with a code or an HTTP status in `unless`.
    """
    from botocore.exceptions import ClientError

    try:
        return with_retries(lambda: getattr(client(), operation)(**parameters))
    except ClientError as error:
        if code_of(error) in unless or status_of(error) in unless:
            return None
        raise


def call_pages(operation: str, *, unless: Container[str] = (), **parameters: Any) -> Iterator[Any]:
    """All pages of a list; none if the server refuses with a code in `unless`."""
    while page := call(operation, unless=unless, **parameters):
        yield page
        if not page.get("IsTruncated"):
            return
        parameters |= {mark: page[f"Next{mark}"] for mark in _MARKS[operation]}


def read_blocks(body: Any, size: int, take: Callable[[bytes], object]) -> None:
    """Read a body of a known size to its end, in blocks.

    Raises:
        MangledError: it ended early, or arrives too slowly.
        BotoCoreError: the connection broke.
    """
    ends = time.monotonic() + _GRACE + size / SLOWEST
    left = size
    while data := body.read(BLOCK):
        take(data)
        left -= len(data)
        if time.monotonic() > ends:
            body.close()
            raise MangledError(f"a body of {size} bytes arrived too slowly")
    if left != 0:
        raise MangledError(f"{size - left} of {size} bytes arrived")


def pause(seconds: float) -> None:
    """Wait between two attempts."""
    time.sleep(seconds)


def _attempts(error: Exception) -> int:
    """The most attempts at a call that fails with this error; 1 if a repetition cannot help."""
    from botocore import exceptions, parsers

    if isinstance(error, exceptions.ClientError):
        transient = status_of(error) in _BUSY or code_of(error) in _TRANSIENT
        return ATTEMPTS if transient else 1
    if isinstance(error, AlteredError):
        return ATTEMPTS_ALTERED
    if isinstance(error, exceptions.EndpointConnectionError | exceptions.ConnectTimeoutError):
        return ATTEMPTS_UNREACHABLE
    broken = (
        exceptions.HTTPClientError,  # any failure of the connection
        exceptions.IncompleteReadError,
        parsers.ResponseParserError,
        MangledError,
    )
    return ATTEMPTS if isinstance(error, broken) else 1
