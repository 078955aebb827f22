"""Bring a Prefect server to the state of `server.definitions`; a second run changes nothing.

Pools, deployments and automations are matched by name, schedules by line (`server.schedules`).
Those that are right stay untouched, so that no trigger is missing for a moment; those that differ
are replaced, and schedules of unknown lines are removed. What a person switched off in Prefect
stays off.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from restitch.deployments.server.definitions import (
    JOB_VARIABLES,
    DeployedFlow,
    automations,
    flows,
    full_name,
)
from restitch.deployments.server.schedules import (
    PAUSED_IN_PREFECT,
    ScheduleState,
    copies,
    plans,
    update,
)
from restitch.merging.errors import BadInput, Unavailable
from restitch.registry.redaction import without_credentials
from restitch.tasks.runtime.console import warn
from restitch.tasks.runtime.engine import engine_url
from restitch.tasks.runtime.events import DEPLOYMENT, has_workers

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient

PREFIX = "restitch: "


@contextmanager
def client() -> "Iterator[SyncPrefectClient]":
    """Prefect's client of the engine's server.

    Raises:
        BadInput: no server is named.
        Unavailable: the server cannot be reached, or refuses.
    """
    url = engine_url()
    if url is None:
        raise BadInput(
            "there is no Prefect server to deploy to",
            expected="PREFECT_API_URL, or a running stack",
            hint="set PREFECT_API_URL, or run `restitch up`",
        )
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import PREFECT_API_URL, temporary_settings

    try:
        # Prefect may have read its settings already, for instance to parse a schedule.
        with (
            temporary_settings({PREFECT_API_URL: url}),
            get_client(sync_client=True) as connected,
        ):
            yield connected
    except (httpx.HTTPError, PrefectHTTPStatusError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "Failed to reach API" not in str(error):
            raise
        raise Unavailable(
            f"the Prefect server at {without_credentials(url)} cannot be used",
            found=without_credentials(str(error))[:300] or type(error).__name__,
            hint="start the server; `restitch doctor` shows what is running",
        ) from None


@dataclass(frozen=True)
class Deployed:
    """The outcome of `deploy`.

    Attributes:
        pools: the work pools that need workers.
        schedules: the state of each line's schedule.
        changes: the changes on the server, for people.
        paused: the deployments and automations that a person switched off in Prefect.
    """

    pools: tuple[str, ...]
    schedules: dict[str, ScheduleState]
    changes: tuple[str, ...]
    paused: tuple[str, ...]

    @property
    def off(self) -> tuple[str, ...]:
        """Everything that is paused, by a decision or in Prefect, for people."""
        lines = self.schedules.items()
        schedules = (f"schedule of {line}: {one.text}" for line, one in lines if one.is_paused)
        return (*schedules, *(f"{name}: {PAUSED_IN_PREFECT}" for name in self.paused))

    @property
    def problems(self) -> dict[str, ScheduleState]:
        """The lines whose schedule could not be set. They do not make a deployment fail.

        Workers may start only after it has succeeded, and they are needed by all lines.
        """
        return {line: one for line, one in self.schedules.items() if one.state == "unknown"}

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def deploy(pool: str = "gpu", remerge_pool: str | None = None) -> Deployed:
    """Make pools, deployments, automations and schedules on the engine's server.

    Args:
        pool: for onboarding models.
        remerge_pool: for merging lines; the same by default.

    Raises:
        Unavailable: the server cannot be reached.
    """
    changes, paused = list[str](), list[str]()
    chosen = flows(pool, remerge_pool or pool)
    pools = tuple(dict.fromkeys(flow.pool for flow in chosen))
    with client() as prefect:
        for name in pools:
            _pool(prefect, name, changes)
        ids = {flow.flow: _deployment(prefect, flow, changes, paused) for flow in chosen}
        _automations(prefect, ids, changes, paused)
        schedules = update(prefect, ids["remerge"], plans(), changes)
    deployed = Deployed(pools, schedules, tuple(changes), tuple(paused))
    for line, problem in deployed.problems.items():
        warn(f"the schedule of {line} is not set: {problem.text}; {problem.remedy}")
    return deployed


def make_pool(name: str) -> None:
    """Make a work pool on the engine's server, which its workers need before they start."""
    with client() as prefect:
        _pool(prefect, name, [])


def keep_schedules(line: str) -> None:
    """Update the schedules to the lines, if the engine's server has deployments.

    Args:
        line: the one that changed; warn if its schedule is not as it should be, or stays off.
    """
    try:
        if not has_workers():
            return
        with client() as prefect:
            remerge = prefect.read_deployment_by_name(full_name("remerge"))
            states = update(prefect, remerge.id, plans(), [])
    except Unavailable as error:
        warn(f"the schedules were not updated, run `restitch deploy`: {error.message()}")
        return
    state = states.get(line)  # none if the line was dropped
    if state is not None and (state.state == "unknown" or state.text == PAUSED_IN_PREFECT):
        warn(f"the schedule of {line}: {state.text}; {state.remedy}")


def _pool(prefect: "SyncPrefectClient", name: str, changes: list[str]) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound

    try:
        prefect.read_work_pool(name)
    except ObjectNotFound:
        try:
            new = WorkPoolCreate(name=name, type="process")
        except ValueError as error:
            raise BadInput(
                f"{name!r} cannot be the name of a work pool",
                expected="a name without / % & > <",
                hint="choose another --pool or --remerge-pool",
            ) from error
        prefect.create_work_pool(new)
        changes.append(f"work pool {name} made")


def _deployment(
    prefect: "SyncPrefectClient", flow: DeployedFlow, changes: list[str], paused: list[str]
) -> "UUID":
    name = full_name(flow.flow)
    present = deployment(prefect, name)
    if present is not None:
        if present.paused:
            paused.append(f"deployment {name}")
        if (
            present.entrypoint == flow.entrypoint
            and present.work_pool_name == flow.pool
            and present.parameters == flow.optional
            and present.job_variables == JOB_VARIABLES
        ):
            found: UUID = present.id
            return found
    # To make it again removes its schedules and switches it on.
    schedules = [] if present is None else prefect.read_deployment_schedules(present.id)
    changes.append(f"deployment {name} on pool {flow.pool}")
    return prefect.create_deployment(
        flow_id=prefect.create_flow_from_name(flow.flow),
        name=DEPLOYMENT,
        entrypoint=flow.entrypoint,
        work_pool_name=flow.pool,
        description=flow.description,
        parameters=flow.optional,
        job_variables=JOB_VARIABLES,
        parameter_openapi_schema=_schema(flow),
        enforce_parameter_schema=True,
        tags=["restitch"],
        pull_steps=[],
        schedules=copies(schedules),
        paused=present is not None and present.paused,
    )


def deployment(prefect: "SyncPrefectClient", name: str) -> Any:
    """A deployment by its full name, or None."""
    from prefect.exceptions import ObjectNotFound

    try:
        return prefect.read_deployment_by_name(name)
    except ObjectNotFound:
        return None


def _schema(flow: DeployedFlow) -> dict[str, Any]:
    """The schema by which Prefect checks a run's parameters."""
    number = {"anyOf": [{"type": "integer"}, {"type": "null"}]}
    types: Mapping[str, dict[str, Any]] = {
        "line": {"type": "string"},
        "task": {"type": "string"},
        "version": number,
        "mlflow_version": number,
        "force": {"type": "boolean"},
        "attempt": {"type": "integer"},
        "offer": {"type": "string"},
    }
    properties = {
        name: {**types[name], "title": name, "position": position}
        for position, name in enumerate((*flow.required, *flow.optional))
    }
    return {
        "title": "Parameters",
        "type": "object",
        "properties": properties,
        "required": list(flow.required),
    }


def _automations(
    prefect: "SyncPrefectClient",
    ids: Mapping[str, "UUID"],
    changes: list[str],
    paused: list[str],
) -> None:
    from prefect.events.schemas.automations import AutomationCore

    present: dict[str, list[Any]] = {}
    for automation in prefect.read_automations():
        present.setdefault(automation.name, []).append(automation)
    for expected in automations(ids["onboard"], ids["remerge"]):
        first, *others = present.pop(expected.name, None) or [None]
        for other in others:
            prefect.delete_automation(other.id)
        if first is not None:
            if not first.enabled:
                expected.enabled = False
                paused.append(f"automation '{expected.name}'")
            core = AutomationCore.model_validate(first.model_dump())
            if _same(core, expected):
                continue
            prefect.delete_automation(first.id)
        prefect.create_automation(expected)
        changes.append(f"automation '{expected.name}'")
    for name, old in present.items():
        if name.startswith(PREFIX):
            for automation in old:
                prefect.delete_automation(automation.id)
            changes.append(f"automation '{name}' removed")


def _same(one: Any, other: Any) -> bool:
    keys = {"trigger", "actions"}
    first, second = (each.model_dump(mode="json", include=keys) for each in (one, other))
    for values in (first, second):
        for key in ("expect", "after", "for_each"):
            values["trigger"][key] = sorted(values["trigger"][key])
        values["trigger"].pop("id", None)
    return bool(first == second)
