"""Sizes and ages in human notation: `500MB`, `5 GB` or plain bytes; `12h`, `7d`."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from restitch.merging.errors import BadInput

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|TB)?\Z", re.IGNORECASE)
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd])\Z", re.IGNORECASE)
_AGES = {"s": 1, "m": 60, "h": 3600, "d": 86400}

# More cannot be counted by file systems and by calendars.
_MOST_BYTES = 2.0**63
_MOST_SECONDS = 1e10


def parse_size(text: str) -> int:
    """Bytes from text such as `500MB`.

    Raises:
        BadInput: it is not a size above zero.
    """
    match = _SIZE.match(text.strip())
    size = float(match[1]) * _UNITS[(match[2] or "B").upper()] if match else 0.0
    if not 1 <= size < _MOST_BYTES:
        raise BadInput(f"{text!r} is not a file size", expected="a size such as 5GB or 500MB")
    return int(size)


def _parsed(value: Any) -> Any:
    try:
        return parse_size(value) if isinstance(value, str) else value
    except BadInput as error:
        raise ValueError(error.message()) from error


# A number of bytes, or a text such as `500MB`.
Size = Annotated[
    int,
    Field(ge=1),
    BeforeValidator(
        _parsed,
        json_schema_input_type=Annotated[int, Field(ge=1)]
        | Annotated[str, Field(pattern=r"^\s*\d+(\.\d+)?\s*([KMGTkmgt]?[Bb])?\s*$")],
    ),
]


def parse_age(text: str) -> float:
    """Seconds from text such as `12h`, `90m` or `7d`.

    Raises:
        BadInput: it is not an age.
    """
    match = _AGE.match(text.strip())
    seconds = float(match[1]) * _AGES[match[2].lower()] if match else _MOST_SECONDS
    if seconds >= _MOST_SECONDS:
        raise BadInput(f"{text!r} is not an age", expected="an age such as 24h, 90m or 7d")
    return seconds
