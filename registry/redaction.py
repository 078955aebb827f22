"""Keeping credentials out of what is shown, logged or stored.

Messages of servers and libraries may hold anything that they were sent. `without_credentials`
takes out user and password of every address, what follows `Authorization`, and whatever the
environment holds under a name that is known to be secret, also as addresses and headers
write it.
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

_SHORTEST = 6  # what is shorter occurs in other words
_ADDRESS = re.compile(r"(\w://)[^/@\s'\"]+@")
_HEADER = re.compile(r"(authorization['\"]?\s*[:=]\s*['\"]?)(?:\w+\s+)?[^\s'\",]+", re.IGNORECASE)


def without_credentials(text: str, environment: Mapping[str, str] | None = None) -> str:
    """A text without the credentials that can be known as such."""
    text = _HEADER.sub(r"\1***", _ADDRESS.sub(r"\1***@", text))
    # The longest first: one secret may be a part of another.
    found = set(_known(os.environ if environment is None else environment))
    for secret in sorted(found, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def _known(environment: Mapping[str, str]) -> Iterator[str]:
    """Every form of every secret that the environment holds."""
    for name in SECRET_VARIABLES:
        secret = environment.get(name, "")
        yield from _forms(secret)
        yield from _forms(secret.partition(":")[2])  # an auth string is user and password
    for name in ADDRESS_VARIABLES:
        # The last @: who forgot to quote a password has one in it.
        given = environment.get(name, "").partition("://")[2].rpartition("@")[0]
        if given:
            yield from _forms(given)
            yield from _forms(unquote(given))
            yield from _forms(unquote(given.partition(":")[2]))


def _forms(secret: str) -> Iterator[str]:
    if len(secret) >= _SHORTEST:
        yield from (secret, quote(secret, safe=""), quote(secret), quote_plus(secret))
        yield base64.b64encode(secret.encode()).decode()
