"""Times as people write them."""

from datetime import UTC, datetime, time

from restitch.merging.errors import BadInput


def parse_time(text: str, of_date: time = time.max) -> datetime:
    """A time that a user gave; without a zone it is UTC.

    Args:
        text: a date, or a date with a time.
        of_date: the time that a date alone means, by default its end.

    Raises:
        BadInput: it is not a time.
    """
    text = text.strip()
    try:
        result = datetime.fromisoformat(text)
    except ValueError:
        raise BadInput(
            f"{text!r} is not a time", expected="for instance 2026-03-03 or 2026-03-03T14:30:00Z"
        ) from None
    if len(text) <= len("2026-03-03"):
        result = datetime.combine(result.date(), of_date)
    return result if result.tzinfo is not None else result.replace(tzinfo=UTC)
