"""The connection to an S3 server: addresses, the client, and explained errors.

boto3 finds the server and the credentials in the environment (`AWS_ENDPOINT_URL`,
`AWS_ACCESS_KEY_ID`, ...); no message repeats them. boto3 is imported when it is needed.
"""

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

from restitch.merging.errors import BadInput, Damage, Unavailable
from restitch.registry.store.base import check_name

BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]\Z")
_LONGEST_PREFIX = 100  # a key has at most 1024 bytes, and a name 900

# In seconds, for one attempt; `s3.retries` makes several.
_CONNECT_TIMEOUT, _READ_TIMEOUT = 4, 10

NOT_ALLOWED = ("AccessDenied", "AllAccessDisabled", "AccountProblem", "403", "Forbidden")
_UNKNOWN = (
    *("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"),
    *("TokenRefreshRequired", "AuthorizationHeaderMalformed", "InvalidSecurity"),
)
_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN for temporary "
    "ones) in the environment of this process"
)

_clients: dict[tuple[object, ...], Any] = {}
_making = threading.Lock()


class MangledError(Exception):
    """A body that was cut on its way, or that arrives too slowly."""


class AlteredError(MangledError):
    """A complete body that is not what was stored."""


def parse_address(address: str) -> tuple[str, str]:
    """The bucket and the prefix of `s3://bucket/prefix`.

    Raises:
        BadInput: it has another form; the message does not repeat it.
    """
    bucket, _, prefix = address.removeprefix("s3://").partition("/")
    prefix = prefix.rstrip("/")
    if not address.startswith("s3://") or not BUCKET.match(bucket):
        raise _bad_address("an invalid bucket name")
    if not prefix or len(prefix) > _LONGEST_PREFIX:
        raise _bad_address("no prefix" if not prefix else f"a prefix of {len(prefix)} characters")
    try:
        return bucket, check_name(prefix)
    except BadInput:
        raise _bad_address("an invalid prefix") from None


def _bad_address(found: str) -> BadInput:
    return BadInput(
        "the address of the store is not valid",
        expected="s3://bucket/prefix of letters, digits, '-', '_' and '.'",
        found=found,
        hint="set RESTITCH_STORE to s3://bucket/prefix; the server goes into AWS_ENDPOINT_URL "
        "and the credentials into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    )


def client() -> Any:
    """The client of this process for the server and credentials in its environment.

    Raises:
        BadInput: the address of the server is not valid.
    """
    # A forked process must not share the connections of its parent.
    settings = ((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))
    key = (os.getpid(), *sorted(settings))
    with _making:
        if key not in _clients:
            _clients.clear()
            _clients[key] = _connect()
        return _clients[key]


def _connect() -> Any:
    import boto3
    from botocore.config import Config

    settings = Config(
        connect_timeout=_CONNECT_TIMEOUT,
        read_timeout=_READ_TIMEOUT,
        retries={"mode": "standard", "total_max_attempts": 1},
        max_pool_connections=32,
        # We send checksums ourselves, as headers that any server may ignore.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"payload_signing_enabled": True},
    )
    try:
        # A separate session: boto3's global one is not thread-safe.
        return boto3.session.Session().client("s3", config=settings)
    except ValueError:
        raise BadInput(
            "AWS_ENDPOINT_URL is not a valid address of a server",
            expected="http://host:port or https://host",
            hint="correct or unset it",
        ) from None


@contextlib.contextmanager
def s3_errors(place: str, doing: str) -> Iterator[None]:
    """Turn what boto3 raises into errors that say what to do.

    Raises:
        Damage: the content is not what was stored.
        Unavailable: the server is unreachable or refuses the call.
    """
    from botocore import exceptions, parsers

    try:
        yield
    except exceptions.ClientError as error:
        _refuse(place, doing, code_of(error), status_of(error))
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError):
        raise Unavailable(
            f"cannot {doing}: there are no credentials for {place}", hint=_CREDENTIALS
        ) from None
    except (exceptions.CredentialRetrievalError, exceptions.ProfileNotFound):
        raise Unavailable(
            f"cannot {doing}: the credentials for {place} cannot be read", hint=_CREDENTIALS
        ) from None
    except AlteredError as error:
        raise Damage(
            f"cannot {doing}: the content at {place} is damaged",
            expected="the content that was written",
            found=str(error),
            hint="run `restitch verify --repair`; restore what it cannot repair from a backup",
        ) from None
    except (exceptions.BotoCoreError, parsers.ResponseParserError, MangledError) as error:
        # Not chained and not quoted: its text may hold an address with a password.
        raise Unavailable(
            f"cannot {doing}: the server of {place} does not answer",
            found=type(error).__name__,
            hint="check AWS_ENDPOINT_URL and the network and run the same command again",
        ) from None


def _refuse(place: str, doing: str, code: str, status: int) -> NoReturn:
    if code == "NoSuchBucket":
        hint = f"create the bucket of {place}, or set RESTITCH_STORE to another one"
    elif code in _UNKNOWN:
        hint = f"the server does not accept the credentials: {_CREDENTIALS}"
    elif code in NOT_ALLOWED or status in (401, 403):
        hint = (
            f"give these credentials the right to list, read and write {place}, or {_CREDENTIALS}"
        )
    else:
        hint = "run the same command again; if it fails again, look at the server's log"
    raise Unavailable(
        f"cannot {doing}: the server of {place} refuses the call",
        found=f"{code} (HTTP {status})",
        hint=hint,
    ) from None


def code_of(error: Any) -> str:
    """The error code of a server's refusal."""
    return str(error.response.get("Error", {}).get("Code", "unknown"))


def status_of(error: Any) -> int:
    """The HTTP status of a server's refusal."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
