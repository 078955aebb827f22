"""How often a call to an S3 server is repeated, and until when: all of it is decided here.

boto3's own repetitions are off. What a network or a server under load does (an error 5xx, a
connection that ends, a body that is cut, altered or endless) is tried again after a random
wait that grows; what a server decides is not. A call that does not get through is the last
error, which `restitch.registry.s3.client.s3_errors` explains.
"""

import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from restitch.registry.s3.client import AlteredError, MangledError, code_of, status_of

Result = TypeVar("Result")

# A server that refuses connections is known to be away after some seconds; one that fails
# every third call is got through to. What is altered again and again is so at the server.
# No attempt begins after the deadline.
ATTEMPTS = 8
ATTEMPTS_UNREACHABLE = ATTEMPTS_ALTERED = 4
DEADLINE = 30.0
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 5.0

# A body that comes more slowly than this, in bytes a second, is taken for endless.
SLOWEST = 128 << 10
_GRACE = 15.0

_BUSY = (429, 500, 502, 503, 504)

# Refusals that say nothing about the call: it was cut or altered on the way, or is early.
_ON_THE_WAY = {
    *("RequestTimeout", "RequestTimeTooSkewed", "SlowDown", "Throttling", "ThrottlingException"),
    *("TooManyRequests", "InternalError", "ServiceUnavailable", "BadDigest", "IncompleteBody"),
    *("XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "OperationAborted"),
}


def with_retries(call: Callable[[], Result], size: int = 0) -> Result:
    """Make a call, again and again while a repetition may help.

    Args:
        call: what to do; it must be fit to be repeated.
        size: the bytes that it moves, for which it gets more time.

    Raises:
        BotoCoreError, ClientError, MangledError: the last attempt's. Its cause is the failure
            before it, where there was one: that attempt may have done what this one was refused.
    """
    from botocore import exceptions, parsers

    failures = (
        *(exceptions.BotoCoreError, exceptions.ClientError),
        *(parsers.ResponseParserError, MangledError),
    )
    ends = time.monotonic() + DEADLINE + size / SLOWEST
    attempt, before = 0, None
    # By how often a call is made that ends so: what is altered once, after the network failed
    # a few times, is not yet altered again and again.
    ended: Counter[int] = Counter()
    while True:
        attempt += 1
        try:
            return call()
        except failures as error:
            most = _attempts(error)
            ended[most] += 1
            wait = random.uniform(0, min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt))
            enough = ended[most] >= most or attempt >= ATTEMPTS
            if enough or time.monotonic() + wait > ends:
                raise error from before
            before = error
        pause(wait)


def read_blocks(body: Any, size: int, take: Callable[[bytes], object], block: int) -> None:
    """Read a body of a known size to its end, block by block.

    Raises:
        MangledError: it ended early, or comes too slowly.
        BotoCoreError: the connection broke.
    """
    ends = time.monotonic() + _GRACE + size / SLOWEST
    left = size
    while data := body.read(block):
        take(data)
        left -= len(data)
        if time.monotonic() > ends:
            body.close()
            raise MangledError(f"a body of {size} bytes came too slowly")
    if left != 0:
        raise MangledError(f"a body of {size} bytes has {size - left}")


def pause(seconds: float) -> None:
    """Wait between two attempts."""
    time.sleep(seconds)


def _attempts(error: Exception) -> int:
    """How often a call is made that ends like this: once, where it would end so again."""
    from botocore import exceptions, parsers

    if isinstance(error, exceptions.ClientError):
        passes = status_of(error) in _BUSY or code_of(error) in _ON_THE_WAY
        return ATTEMPTS if passes else 1
    if isinstance(error, AlteredError):
        return ATTEMPTS_ALTERED
    if isinstance(error, exceptions.EndpointConnectionError | exceptions.ConnectTimeoutError):
        return ATTEMPTS_UNREACHABLE
    broken = (
        exceptions.HTTPClientError,  # whatever became of the connection
        exceptions.IncompleteReadError,
        parsers.ResponseParserError,
        MangledError,
    )
    return ATTEMPTS if isinstance(error, broken) else 1
