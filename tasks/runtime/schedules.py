"""Check a schedule with the parser that follows it later: the one of Prefect's server.

One deployment has the schedules of all lines. A cron line that the parser cannot follow would
stop the schedules of the other lines, too.
"""

import asyncio
from difflib import get_close_matches
from zoneinfo import available_timezones

from restitch.merging.errors import BadInput
from restitch.registry.specs.line import DEFAULT_CRON, DEFAULT_TIMEZONE, ScheduleSpec

_FIELDS = ("minute", "hour", "day of the month", "month", "day of the week")
_EXPECTED = (
    "minute 0-59, hour 0-23, day 1-31, month 1-12 or jan-dec, day of the week 0-6 or sun-sat"
)


def check_schedule(schedule: ScheduleSpec | None, origin: str) -> None:
    """Refuse a schedule that Prefect's server does not accept, or that never fires.

    Args:
        schedule: of a line; None is no schedule.
        origin: the file that it comes from.

    Raises:
        BadInput: its time zone does not exist, or its cron line cannot be followed.
    """
    if schedule is None or schedule == ScheduleSpec(cron=DEFAULT_CRON):
        return
    if schedule.timezone not in available_timezones():
        raise BadInput(
            f"{origin}: schedule: there is no time zone {schedule.timezone!r}",
            expected="a name of the IANA database, such as UTC or Europe/Berlin",
            hint=_nearest(schedule.timezone),
        )
    from prefect.server.schemas.schedules import CronSchedule

    try:
        parsed = CronSchedule(cron=schedule.cron, timezone=schedule.timezone)
    except ValueError as error:
        raise BadInput(
            f"{origin}: schedule: {schedule.cron!r} is not a cron line",
            expected=_EXPECTED,
            found=_wrong_field(schedule.cron),
            hint="correct the schedule; `schedule: null` is none",
        ) from error
    try:
        asyncio.run(parsed.get_dates(n=1))
    except Exception as error:  # the parser raises errors of several types
        raise BadInput(
            f"{origin}: schedule: {str(schedule)!r} never fires",
            expected="a cron line with dates that exist",
            found=str(error),
            hint="correct the schedule; `schedule: null` is none",
        ) from error


def _nearest(timezone: str) -> str:
    names = {name.casefold(): name for name in sorted(available_timezones())}
    near = get_close_matches(timezone.casefold(), names, n=3)
    if not near:
        return f"leave the time zone out for {DEFAULT_TIMEZONE}"
    return f"did you mean {' or '.join(names[name] for name in near)}?"


def _wrong_field(cron: str) -> str:
    """The first field of a cron line that the parser refuses."""
    from prefect.server.schemas.schedules import CronSchedule

    fields = cron.split()
    for place, field in enumerate(fields if len(fields) == len(_FIELDS) else ()):
        alone = ["*"] * len(_FIELDS)
        alone[place] = field
        try:
            CronSchedule(cron=" ".join(alone))
        except ValueError:
            return f"{_FIELDS[place]}: {field}"
    return cron
