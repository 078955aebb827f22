"""Times as people write them."""

from datetime import UTC, datetime, time

from restitch.merging.errors import BadInput


def moment(text: str) -> datetime:
    """A time that a user gave; a date alone is its end, without a zone it is UTC.

    Raises:
        BadInput: it is not a time.
    """
    try:
        found = datetime.fromisoformat(text.strip())
    except ValueError:
        raise BadInput(
            f"{text!r} is not a time", expected="for instance 2026-03-03 or 2026-03-03T14:30:00Z"
        ) from None
    if len(text.strip()) <= len("2026-03-03"):
        found = datetime.combine(found.date(), time.max)
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def start_of(text: str) -> datetime:
    """The same for the beginning of a span: a date alone is its first moment."""
    found = moment(text)
    if len(text.strip()) <= len("2026-03-03"):
        found = datetime.combine(found.date(), time.min, tzinfo=found.tzinfo)
    return found
