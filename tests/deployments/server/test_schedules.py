"""The schedules of lines on a server: set, changed, paused, and left to people."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.exceptions import PrefectHTTPStatusError

from restitch.deployments.server.schedules import (
    LinePlan,
    ScheduleState,
    by_line,
    compare,
    copies,
    plans,
    update,
)
from restitch.merging.errors import Damage
from restitch.registry.ledger.line_state import Pause
from restitch.registry.specs.line import DEFAULT_CRON, ScheduleSpec
from tests.conftest import NewHome
from tests.worlds import World, write_yaml

REMERGE = uuid4()
NIGHTLY, HOURLY = ScheduleSpec(cron="0 3 * * *"), ScheduleSpec(cron="0 * * * *")
PAUSE = Pause(schedule_only=False, actor="ann", since="2026-03-03T10:00:00+00:00", reason="repair")
SCHEDULE_ONLY = PAUSE.model_copy(update={"schedule_only": True})


@dataclass
class Server:
    """The part of a Prefect server that holds schedules.

    Attributes:
        refused: the cron lines that it refuses, with the status.
        calls: the names of the calls that changed something.
    """

    schedules: list[DeploymentSchedule] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)

    def read_deployment_schedules(self, _: UUID) -> list[DeploymentSchedule]:
        return list(self.schedules)

    def create_deployment_schedules(self, _: UUID, new: list[DeploymentScheduleCreate]) -> None:
        self.calls.append("create")
        for one in new:
            self._accept(one.schedule)
            values = one.model_dump(include={"active", "parameters", "slug"})
            made = DeploymentSchedule(id=uuid4(), schedule=one.schedule, **values)
            self.schedules.append(made)

    def update_deployment_schedule(self, _: UUID, one_id: UUID, /, **changes: Any) -> None:
        self.calls.append("update")
        self._accept(changes.get("schedule"))
        changes.setdefault("parameters", {})  # as Prefect does
        self.schedules = [
            one.model_copy(update=changes) if one.id == one_id else one for one in self.schedules
        ]

    def delete_deployment_schedule(self, _: UUID, schedule: UUID) -> None:
        self.calls.append("delete")
        self.schedules = [one for one in self.schedules if one.id != schedule]

    def _accept(self, schedule: Any) -> None:
        status = self.refused.get(getattr(schedule, "cron", ""))
        if status is not None:
            request = httpx.Request("POST", "http://prefect")
            response = httpx.Response(status, text="not a schedule", request=request)
            raise PrefectHTTPStatusError("refused", request=request, response=response)

    def toggle(self, line: str, active: bool) -> None:
        """What a person does in Prefect's page."""
        (one,) = [s for s in self.schedules if s.parameters == {"line": line}]
        same = {"parameters": one.parameters, "slug": one.slug}
        self.update_deployment_schedule(REMERGE, one.id, active=active, **same)

    def crons(self) -> dict[str, str]:
        return {s.parameters["line"]: cast(Any, s.schedule).cron for s in self.schedules}

    def active(self) -> dict[str, bool]:
        return {s.parameters["line"]: s.active for s in self.schedules}


@pytest.fixture
def server() -> Server:
    return Server()


def told(server: Server, **wanted: LinePlan) -> tuple[dict[str, ScheduleState], list[str]]:
    changes: list[str] = []
    states = update(cast(SyncPrefectClient, server), REMERGE, wanted, changes)
    return states, changes


def test_schedules_are_made_once_and_follow_their_lines(server: Server) -> None:
    states, changes = told(server, a=LinePlan(NIGHTLY), b=LinePlan(HOURLY))
    assert {line: state.state for line, state in states.items()} == {"a": "on", "b": "on"}
    assert changes == ["schedule of a: 0 3 * * * UTC", "schedule of b: 0 * * * * UTC"]
    assert told(server, a=LinePlan(NIGHTLY), b=LinePlan(HOURLY))[1] == []
    berlin = NIGHTLY.model_copy(update={"timezone": "Europe/Berlin"})
    assert told(server, a=LinePlan(berlin), b=LinePlan(HOURLY))[1] == [
        "schedule of a: 0 3 * * * Europe/Berlin"
    ]
    assert told(server, b=LinePlan(HOURLY))[1] == ["schedule of a: removed"]
    assert server.crons() == {"b": HOURLY.cron}
    assert server.calls == ["create", "create", "update", "delete"]
    assert [one.slug for one in server.schedules] == ["b"]


def test_a_line_without_a_schedule_has_none_on_the_server(server: Server) -> None:
    told(server, a=LinePlan(NIGHTLY))
    states, changes = told(server, a=LinePlan(None))
    assert (states["a"].state, changes) == ("none", ["schedule of a: removed"])
    assert server.schedules == []
    assert told(server, a=LinePlan(None))[1] == []


@pytest.mark.parametrize("pause", [PAUSE, SCHEDULE_ONLY])
def test_a_pause_switches_the_schedule_off_and_resuming_switches_it_on(
    server: Server, pause: Pause
) -> None:
    told(server, a=LinePlan(NIGHTLY), b=LinePlan(HOURLY))
    states, changes = told(server, a=LinePlan(NIGHTLY, pause), b=LinePlan(HOURLY))
    assert changes == ["schedule of a: paused"]
    assert server.active() == {"a": False, "b": True}
    assert states["a"].state == "paused"
    assert states["a"].text == "paused since 2026-03-03 10:00 UTC by ann: repair"
    assert states["a"].remedy == "restitch resume a"
    assert told(server, a=LinePlan(NIGHTLY, pause), b=LinePlan(HOURLY))[1] == []
    assert told(server, a=LinePlan(NIGHTLY), b=LinePlan(HOURLY))[1] == ["schedule of a: resumed"]
    assert server.active() == {"a": True, "b": True}


def test_a_schedule_that_a_person_paused_in_prefect_stays_paused(server: Server) -> None:
    told(server, a=LinePlan(NIGHTLY))
    server.toggle("a", False)
    for plan in (LinePlan(NIGHTLY), LinePlan(HOURLY)):  # also when the line file changes
        states, _ = told(server, a=plan)
        assert server.active() == {"a": False}
        assert (states["a"].state, states["a"].text) == ("paused", "paused in Prefect")
    assert server.crons() == {"a": HOURLY.cron}
    # A pause of the ledger that ends does not switch it on either.
    told(server, a=LinePlan(HOURLY, PAUSE))
    states, _ = told(server, a=LinePlan(HOURLY))
    assert server.active() == {"a": False}
    assert states["a"].text == "paused in Prefect"
    server.toggle("a", True)
    assert told(server, a=LinePlan(HOURLY))[0]["a"].state == "on"


def test_a_paused_line_stays_paused_although_its_schedule_was_switched_on_in_prefect(
    server: Server,
) -> None:
    told(server, a=LinePlan(NIGHTLY, PAUSE))
    assert server.active() == {"a": False}
    server.toggle("a", True)
    assert told(server, a=LinePlan(NIGHTLY, PAUSE))[1] == ["schedule of a: paused"]
    assert told(server, a=LinePlan(NIGHTLY, PAUSE))[1] == []
    assert server.active() == {"a": False}
    assert told(server, a=LinePlan(NIGHTLY))[0]["a"].state == "on"


def test_a_refused_schedule_does_not_stop_the_others(server: Server) -> None:
    server.refused = {NIGHTLY.cron: 422}
    states, changes = told(server, a=LinePlan(NIGHTLY), b=LinePlan(HOURLY))
    assert changes == ["schedule of b: 0 * * * * UTC"]
    assert server.crons() == {"b": HOURLY.cron}
    assert states["a"].state == "unknown"
    assert "not a schedule" in states["a"].text
    assert "restitch init" in states["a"].remedy


def test_a_busy_server_is_no_refusal(server: Server) -> None:
    server.refused = {NIGHTLY.cron: 503}
    with pytest.raises(PrefectHTTPStatusError):
        told(server, a=LinePlan(NIGHTLY))


@pytest.mark.parametrize("cron", ["61 * * * *", "0 0 31 2 *"])
def test_a_stored_cron_line_that_cannot_be_followed_never_reaches_the_server(
    server: Server, cron: str
) -> None:
    states, _ = told(server, a=LinePlan(ScheduleSpec(cron=cron)), b=LinePlan(HOURLY))
    assert states["a"].state == "unknown"
    assert cron in states["a"].text
    assert server.crons() == {"b": HOURLY.cron}


def test_the_schedule_of_a_line_that_cannot_be_read_stays_as_it_is(server: Server) -> None:
    told(server, a=LinePlan(NIGHTLY))
    states, changes = told(server, a=LinePlan(problem=Damage("a is damaged", hint="repair it")))
    assert (states["a"].state, changes) == ("unknown", [])
    assert (states["a"].text, states["a"].remedy) == ("a is damaged", "repair it")
    assert server.crons() == {"a": NIGHTLY.cron}


def test_a_second_schedule_of_a_line_is_removed(server: Server) -> None:
    told(server, a=LinePlan(NIGHTLY))
    server.create_deployment_schedules(REMERGE, copies(server.schedules))
    assert told(server, a=LinePlan(NIGHTLY))[1] == ["schedule of a: removed"]
    assert len(server.schedules) == 1


def test_a_schedule_that_has_lost_its_parameters_gets_them_again(server: Server) -> None:
    """`prefect deployment schedule pause` drops them."""
    told(server, a=LinePlan(NIGHTLY), b=LinePlan(HOURLY))
    before = {one.slug: one.id for one in server.schedules}
    server.update_deployment_schedule(REMERGE, before["a"], active=False)
    present, _ = by_line(server.schedules)
    assert compare("a", LinePlan(NIGHTLY), present["a"]).state == "wrong"
    states, changes = told(server, a=LinePlan(NIGHTLY), b=LinePlan(HOURLY))
    assert changes == ["schedule of a: its parameter again"]
    assert states["a"].text == "paused in Prefect"
    assert {one.slug: one.id for one in server.schedules} == before
    assert server.crons() == {"a": NIGHTLY.cron, "b": HOURLY.cron}


def test_copies_keep_what_was_switched_off(server: Server) -> None:
    told(server, a=LinePlan(NIGHTLY), b=LinePlan(HOURLY, PAUSE))
    server.toggle("a", False)
    again = Server()
    again.create_deployment_schedules(REMERGE, copies(server.schedules))
    assert told(again, a=LinePlan(NIGHTLY), b=LinePlan(HOURLY))[1] == ["schedule of b: resumed"]
    assert again.active() == {"a": False, "b": True}


def test_the_plans_come_from_the_lines_and_one_bad_line_hides_no_other(
    world: World, new_home: NewHome, tmp_path: Path
) -> None:
    shell = new_home("home")
    shell("init", world.line(tmp_path / "a.yaml", line="plain", retention=None))
    shell("init", world.line(tmp_path / "b.yaml", line="often", schedule="* * * * *"))
    never = write_yaml(
        tmp_path / "c.yaml",
        {
            "line": "never",
            "base": str(world.base),
            "family": world.family,
            "method": "localize-and-stitch",
            "schedule": None,
        },
    )
    shell("init", never)
    shell("init", world.line(tmp_path / "d.yaml", line="broken", retention=None))
    shell("pause", "often", "--schedule-only", "--reason", "too often")
    (shell.home / "store" / "lines" / "broken" / "head.json").write_text("{}")
    with shell.inside():
        found = plans()
    assert list(found) == ["broken", "never", "often", "plain"]
    assert found["plain"].schedule == ScheduleSpec(cron=DEFAULT_CRON)
    assert found["never"].schedule is None
    assert found["often"].pause is not None
    worked_on = {line: plan.is_worked_on for line, plan in found.items()}
    assert worked_on == {"broken": False, "never": True, "often": True, "plain": True}
    assert found["broken"].problem is not None
