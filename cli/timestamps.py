"""Times as people write them."""

from datetime import UTC, datetime, time

from restitch.merging.errors import BadInput

_DATE_LENGTH = len("2026-03-03")


def parse_time(text: str) -> datetime:
    """A time that a user gave; a date means its end, and without a zone it is UTC.

    Raises:
        BadInput: it is not a time.
    """
    try:
        result = datetime.fromisoformat(text.strip())
    except ValueError:
        raise BadInput(
            f"{text!r} is not a time", expected="for instance 2026-03-03 or 2026-03-03T14:30:00Z"
        ) from None
    if len(text.strip()) <= _DATE_LENGTH:
        result = datetime.combine(result.date(), time.max)
    return result if result.tzinfo is not None else result.replace(tzinfo=UTC)


def start_of(text: str) -> datetime:
    """The same for the beginning of a span: a date means its beginning."""
    result = parse_time(text)
    if len(text.strip()) <= _DATE_LENGTH:
        result = datetime.combine(result.date(), time.min, tzinfo=result.tzinfo)
    return result
