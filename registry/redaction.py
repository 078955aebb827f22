"""Removal of credentials from texts that are shown, logged or stored.

Messages of servers and libraries may quote anything that they received. `without_credentials`
removes user and password from every address, the value of every `Authorization` header, and the
values of environment variables that hold secrets, also in encoded form. In an address that
notifications are sent to, every part may be a secret.
"""

import base64
import os
import re
from collections.abc import Iterator, Mapping
from urllib.parse import quote, quote_plus, unquote

SECRET_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY",
    "PREFECT_API_AUTH_STRING",
    "PREFECT_API_KEY",
    "RESTITCH_WEBHOOK_SECRET",
)
ADDRESS_VARIABLES = (
    "AWS_ENDPOINT_URL",
    "HF_ENDPOINT",
    "MLFLOW_BACKEND_STORE_URI",
    "MLFLOW_TRACKING_URI",
    "PREFECT_API_DATABASE_CONNECTION_URL",
    "PREFECT_API_URL",
    "PREFECT_SERVER_DATABASE_CONNECTION_URL",
    "RESTITCH_STORE",
)

# Addresses of services, in which tokens also stand in place of the host and in the path.
NOTIFY_VARIABLE = "RESTITCH_NOTIFY_URLS"

_SHORTEST = 6  # shorter secrets occur in other words
_ADDRESS = re.compile(r"(\w://)[^/@\s'\"]+@")
_HOST = re.compile(r"localhost|(?:[a-z0-9-]+\.)+(?:[a-z]{2,}|\d{1,3})")
_WORD = re.compile(r"[a-z][a-z-]{0,15}")
_HEADER = re.compile(r"(authorization['\"]?\s*[:=]\s*['\"]?)(?:\w+\s+)?[^\s'\",]+", re.IGNORECASE)


def without_credentials(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Replace all known credentials in a text by `***`."""
    text = _HEADER.sub(r"\1***", _ADDRESS.sub(r"\1***@", text))
    # The longest first: one secret may be a part of another.
    secrets = set(_known(os.environ if environment is None else environment))
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type, without credentials."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return without_credentials(lines[0] if lines else type(error).__name__)[:300]


def _known(environment: Mapping[str, str]) -> Iterator[str]:
    """All secrets in the environment, in all forms."""
    for name in SECRET_VARIABLES:
        secret = environment.get(name, "")
        yield from _forms(secret)
        yield from _forms(secret.partition(":")[2])  # an auth string is user and password
    for name in ADDRESS_VARIABLES:
        # The last @: an unquoted password may contain one.
        login = environment.get(name, "").partition("://")[2].rpartition("@")[0]
        if login:
            yield from _forms(login)
            yield from _forms(unquote(login))
            yield from _forms(unquote(login.partition(":")[2]))
    for address in notify_addresses(environment):
        yield from _forms(address)
        for part in _parts(address):
            yield from _forms(part)
            yield from _forms(unquote(part))


def notify_addresses(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The addresses that notifications are sent to; white space or commas separate them."""
    text = environment.get(NOTIFY_VARIABLE, "").strip().strip(",")
    return tuple(re.split(r"[\s,]+(?=\w+://)", text)) if text else ()


def _parts(address: str) -> Iterator[str]:
    """The parts of an address that may be secret: no names of hosts, and no plain words."""
    rest = address.partition("://")[2]
    for login in (rest.partition("@")[0], rest.rpartition("@")[0]):
        if "@" in rest:
            yield from (login, login.partition(":")[2])
    for part in re.split(r"[/:@?&=;#]", rest):
        if not _HOST.fullmatch(part) and not _WORD.fullmatch(part):
            yield part


def _forms(secret: str) -> Iterator[str]:
    if len(secret) >= _SHORTEST:
        yield from (secret, quote(secret, safe=""), quote(secret), quote_plus(secret))
        yield base64.b64encode(secret.encode()).decode()
