"""The schedules of all lines on a Prefect server: as they should be, and as they are.

Each line has at most one schedule of the deployment `remerge`, recognized by its slug. `deploy` and
`init` bring a server to that state, and `doctor` describes the differences with the same function.
The ledger decides whether a line is paused. A schedule that a person switched off in Prefect stays
off: only what a pause of the ledger switched off is switched on again, and the slug of such a
schedule says so. Prefect's command for a switch drops the parameters of a schedule; they are put
back here, and until then a run finds its line by the slug.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from restitch.deployments.server.definitions import line_of_slug, slug_of
from restitch.merging.errors import BadInput, RestitchError
from restitch.registry.ledger.ledger import lines
from restitch.registry.ledger.line_state import Pause
from restitch.registry.specs.line import ScheduleSpec
from restitch.tasks.runtime.schedules import check_schedule
from restitch.tasks.runtime.workspace import workspace

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.objects import DeploymentSchedule

PAUSED_IN_PREFECT = "paused in Prefect"


@dataclass(frozen=True)
class LinePlan:
    """What a line wants of its schedule.

    Attributes:
        schedule: when to remerge; None is never.
        pause: the pause of the line or of its schedule.
        problem: why the line cannot be read; its schedule then stays as it is.
    """

    schedule: ScheduleSpec | None = None
    pause: Pause | None = None
    problem: RestitchError | None = None

    @property
    def is_worked_on(self) -> bool:
        """True if the line can be read, and automatic work on it is not paused."""
        return self.problem is None and (self.pause is None or self.pause.schedule_only)


@dataclass(frozen=True)
class ScheduleState:
    """A line's schedule on the server, compared with its plan.

    Attributes:
        state: on; paused (by the ledger, or in Prefect); none (as planned); wrong (differs from
            the plan); unknown (the line cannot be read, or the server refused the schedule).
        text: the state, for people.
        remedy: the remedy; empty if the state is right.
    """

    state: Literal["on", "paused", "none", "wrong", "unknown"]
    text: str
    remedy: str = ""

    @property
    def is_paused(self) -> bool:
        """True if it is off by a decision or in Prefect."""
        return self.state == "paused"

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def plans() -> dict[str, LinePlan]:
    """The plan of each line; a line that cannot be read does not hide the others."""
    space = workspace()
    found = {}
    for line in lines(space.objects):
        try:
            line_state = space.ledger(line, dropped=True).state()
        except RestitchError as error:
            found[line] = LinePlan(problem=error)
            continue
        if line_state.dropped is None:
            found[line] = LinePlan(line_state.spec.schedule, line_state.paused)
    return found


def compare(line: str, plan: LinePlan, present: "DeploymentSchedule | None") -> ScheduleState:
    """Compare a line's schedule on the server with its plan."""
    if plan.problem is not None:
        return ScheduleState("unknown", _in_one_line(plan.problem), plan.problem.hint or "")
    if plan.schedule is None:
        if present is None:
            return ScheduleState("none", "none; events and `restitch remerge` start remerges")
        return ScheduleState("wrong", f"{_shown(present)}, expected none", "restitch deploy")
    if present is None:
        return ScheduleState("wrong", "none", "restitch deploy")
    if not _follows(present, plan.schedule):
        text = f"{_shown(present)}, expected {plan.schedule}"
        return ScheduleState("wrong", text, "restitch deploy")
    if present.parameters != {"line": line}:
        return ScheduleState("wrong", "it has lost its parameter `line`", "restitch deploy")
    if plan.pause is not None:
        if present.active:
            return ScheduleState("wrong", f"on, but paused {plan.pause}", "restitch deploy")
        return ScheduleState("paused", f"paused {plan.pause}", f"restitch resume {line}")
    if present.active:
        return ScheduleState("on", str(plan.schedule))
    if _switched_off_by_us(present):
        return ScheduleState("wrong", "off, but the line was resumed", "restitch deploy")
    remedy = "to switch it on: its page of the deployment remerge/restitch in Prefect"
    return ScheduleState("paused", PAUSED_IN_PREFECT, remedy)


def by_line(
    schedules: "Iterable[DeploymentSchedule]",
) -> "tuple[dict[str, DeploymentSchedule], list[DeploymentSchedule]]":
    """The schedule of each line, and those that are no line's or a second one."""
    first: dict[str, DeploymentSchedule] = {}
    others = []
    for schedule in schedules:
        line = line_of_slug(schedule.slug or "")
        if line in first:
            others.append(schedule)
        else:
            first[line] = schedule
    return first, others


def update(
    prefect: "SyncPrefectClient",
    remerge: "UUID",
    wanted: Mapping[str, LinePlan],
    changes: list[str],
) -> dict[str, ScheduleState]:
    """Bring the schedules of a server to their plans; a refused one does not stop the others.

    Args:
        prefect: the server.
        remerge: the deployment `remerge`.
        wanted: the plan of each line.
        changes: receives a sentence about each change.

    Returns:
        The state of each line's schedule afterwards.
    """
    present, others = by_line(prefect.read_deployment_schedules(remerge))
    unknown = [one for line, one in present.items() if line not in wanted]
    for schedule in (*others, *unknown):
        prefect.delete_deployment_schedule(remerge, schedule.id)
        changes.append(f"schedule of {line_of_slug(schedule.slug or '')}: removed")
    refused = {}
    for line, plan in wanted.items():
        try:
            with _refusals(plan):
                done = _update_one(prefect, remerge, line, plan, present.get(line))
        except BadInput as error:
            remedy = f"correct `schedule` in the file of {line} and run `restitch init`"
            refused[line] = ScheduleState("unknown", _in_one_line(error), remedy)
            continue
        if done is not None:
            changes.append(f"schedule of {line}: {done}")
    now, _ = by_line(prefect.read_deployment_schedules(remerge))
    return {
        line: refused.get(line) or compare(line, plan, now.get(line))
        for line, plan in wanted.items()
    }


@contextmanager
def _refusals(plan: LinePlan) -> Iterator[None]:
    """Turn the server's refusal of a schedule into `BadInput`; a busy server raises as it does."""
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        yield
    except PrefectHTTPStatusError as error:
        if error.response.status_code >= 500:
            raise
        raise BadInput(
            f"Prefect refuses the schedule {plan.schedule}", found=error.response.text[:200]
        ) from error


def _update_one(
    prefect: "SyncPrefectClient",
    remerge: "UUID",
    line: str,
    plan: LinePlan,
    present: "DeploymentSchedule | None",
) -> str | None:
    """Bring one schedule to its plan, and say what changed."""
    if plan.problem is not None:
        return None
    if plan.schedule is None:
        if present is None:
            return None
        prefect.delete_deployment_schedule(remerge, present.id)
        return "removed"
    if present is None or not _follows(present, plan.schedule):
        check_schedule(plan.schedule, line)
    if present is None:
        prefect.create_deployment_schedules(remerge, [_new(line, plan)])
        return str(plan.schedule) + (", paused" if plan.pause is not None else "")
    done, new = [], dict[str, Any]()
    if not _follows(present, plan.schedule):
        new["schedule"] = _cron(plan.schedule)
        done.append(str(plan.schedule))
    if plan.pause is not None and present.active:
        new |= {"active": False, "slug": slug_of(line, paused=True)}
        done.append("paused")
    elif plan.pause is None and _switched_off_by_us(present):
        new |= {"active": True, "slug": slug_of(line, paused=False)}
        done.append("resumed")
    if present.parameters != {"line": line}:
        done.append("its parameter again")
    if not done:
        return None
    prefect.update_deployment_schedule(remerge, present.id, parameters={"line": line}, **new)
    return ", ".join(done)


def copies(schedules: "Iterable[DeploymentSchedule]") -> "list[DeploymentScheduleCreate]":
    """The same schedules, for a deployment that is made again."""
    from prefect.client.schemas.actions import DeploymentScheduleCreate

    keys = ("schedule", "active", "parameters", "slug")
    return [DeploymentScheduleCreate(**{k: getattr(one, k) for k in keys}) for one in schedules]


def _in_one_line(error: RestitchError) -> str:
    return error.summary if error.found is None else f"{error.summary}: {error.found}"


def _new(line: str, plan: LinePlan) -> "DeploymentScheduleCreate":
    from prefect.client.schemas.actions import DeploymentScheduleCreate

    assert plan.schedule is not None
    return DeploymentScheduleCreate(
        schedule=_cron(plan.schedule),
        active=plan.pause is None,
        parameters={"line": line},
        slug=slug_of(line, paused=plan.pause is not None),
    )


def _cron(schedule: ScheduleSpec) -> Any:
    from prefect.client.schemas.schedules import CronSchedule

    return CronSchedule(cron=schedule.cron, timezone=schedule.timezone)


def _follows(present: "DeploymentSchedule", schedule: ScheduleSpec) -> bool:
    cron, timezone = (getattr(present.schedule, name, None) for name in ("cron", "timezone"))
    return (cron, timezone) == (schedule.cron, schedule.timezone)


def _shown(present: "DeploymentSchedule") -> str:
    cron, timezone = (getattr(present.schedule, name, "?") for name in ("cron", "timezone"))
    return f"{cron} {timezone}"


def _switched_off_by_us(present: "DeploymentSchedule") -> bool:
    slug = present.slug or ""
    return slug == slug_of(line_of_slug(slug), paused=True)
