"""A schedule is accepted exactly if Prefect's server can follow it."""

import asyncio
import sys
from zoneinfo import available_timezones

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from restitch.merging.errors import BadInput
from restitch.registry.specs.line import DEFAULT_CRON, ScheduleSpec
from restitch.tasks.runtime.schedules import check_schedule

# Mostly cron fields, with numbers just inside and just outside of their ranges.
NUMBERS = st.sampled_from([0, 1, 5, 6, 7, 12, 13, 23, 24, 29, 30, 31, 32, 59, 60, 61, 99])
FIELD = st.one_of(
    st.just("*"),
    NUMBERS.map(str),
    st.tuples(NUMBERS, NUMBERS).map("{0[0]}-{0[1]}".format),
    NUMBERS.map("*/{}".format),
    st.lists(NUMBERS, min_size=1, max_size=3).map(lambda values: ",".join(map(str, values))),
    st.sampled_from(["mon", "feb", "L", "?", "r", "h", "5#2", "-1", "*/", ","]),
)


def refusal(cron: str, timezone: str = "UTC") -> str:
    with pytest.raises(BadInput) as raised:
        check_schedule(ScheduleSpec(cron=cron, timezone=timezone), "line.yaml")
    return raised.value.message()


@given(st.lists(FIELD, min_size=5, max_size=5).map(" ".join))
def test_a_cron_line_is_accepted_exactly_if_the_server_finds_its_next_date(cron: str) -> None:
    try:
        check_schedule(ScheduleSpec(cron=cron), "line.yaml")
    except (BadInput, ValidationError):
        accepted = False
    else:
        accepted = True
    assert accepted == server_follows(cron)


def server_follows(cron: str) -> bool:
    from prefect.server.schemas.schedules import CronSchedule

    try:
        dates = asyncio.run(CronSchedule(cron=cron, timezone="UTC").get_dates(n=1))
    except Exception:
        return False
    return len(dates) == 1


@pytest.mark.parametrize(
    ("cron", "field"),
    [
        ("61 * * * *", "minute: 61"),
        ("* 24 * * *", "hour: 24"),
        ("* * 0 * *", "day of the month: 0"),
        ("* * * 13 *", "month: 13"),
        ("* * * * 8", "day of the week: 8"),
        ("*/0 * * * *", "minute: */0"),
    ],
)
def test_a_wrong_field_is_named(cron: str, field: str) -> None:
    message = refusal(cron)
    assert field in message
    assert "line.yaml: schedule:" in message
    assert "minute 0-59" in message


@pytest.mark.parametrize("cron", ["0 0 31 2 *", "0 0 30 feb *", "0 0 31 4,6,9,11 *"])
def test_a_date_that_does_not_exist_is_refused(cron: str) -> None:
    assert "never fires" in refusal(cron)


@pytest.mark.parametrize("cron", ["@daily", "0 3 * * mon-fri", "0 0 29 2 *", "5,10-20/2 1 * * *"])
def test_other_forms_of_cron_are_accepted(cron: str) -> None:
    check_schedule(ScheduleSpec(cron=cron), "line.yaml")


@pytest.mark.parametrize("cron", ["@reboot", "@fortnightly"])
def test_a_word_that_is_no_schedule_is_refused(cron: str) -> None:
    assert cron in refusal(cron)


@pytest.mark.parametrize(
    ("timezone", "near"),
    [("Europe/Berln", "Europe/Berlin"), ("europe/berlin", "Europe/Berlin"), ("+02:00", "UTC")],
)
def test_an_unknown_time_zone_is_refused_and_the_nearest_is_named(timezone: str, near: str) -> None:
    message = refusal("0 3 * * *", timezone)
    assert timezone in message
    assert near in message


@given(st.sampled_from(sorted(available_timezones())))
def test_every_time_zone_is_followed_or_refused_with_a_message(timezone: str) -> None:
    try:
        check_schedule(ScheduleSpec(cron="30 2 * * *", timezone=timezone), "line.yaml")
    except BadInput:
        assert timezone in refusal("30 2 * * *", timezone)


@pytest.fixture
def no_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prefect.server.schemas.schedules", None)


@pytest.mark.usefixtures("no_parser")
def test_no_schedule_and_the_default_need_no_parser() -> None:
    check_schedule(None, "line.yaml")
    check_schedule(ScheduleSpec(cron=DEFAULT_CRON), "line.yaml")
