"""Bring a Prefect server to the state of `server.definitions`; a second run changes nothing.

Pools, deployments and automations are matched by name, schedules by line. Those that are right
stay untouched, so that no trigger is missing for a moment; those that differ are replaced, and
schedules of unknown lines are removed.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from restitch.deployments.server.definitions import (
    DEFAULT_CRON,
    JOB_VARIABLES,
    DeployedFlow,
    automations,
    flows,
    full_name,
)
from restitch.merging.errors import BadInput, Unavailable
from restitch.registry.ledger.ledger import lines
from restitch.registry.mlflow.sync import without_credentials
from restitch.tasks.runtime.console import warn
from restitch.tasks.runtime.engine import engine_url
from restitch.tasks.runtime.events import DEPLOYMENT, has_workers
from restitch.tasks.runtime.workspace import workspace

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
    os.environ["PREFECT_API_URL"] = url  # before Prefect reads its settings
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        with get_client(sync_client=True) as connected:
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
        schedules: each line's cron expression.
        changes: the changes on the server, for people.
    """

    pools: tuple[str, ...]
    schedules: dict[str, str]
    changes: tuple[str, ...]

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
    schedules = cron_lines()
    changes: list[str] = []
    with client() as prefect:
        chosen = flows(pool, remerge_pool or pool)
        pools = tuple(dict.fromkeys(flow.pool for flow in chosen))
        for name in pools:
            _pool(prefect, name, changes)
        ids = {flow.flow: _deployment(prefect, flow, changes) for flow in chosen}
        _automations(prefect, ids, changes)
        _schedules(prefect, ids["remerge"], schedules, changes)
    return Deployed(pools, schedules, tuple(changes))


def keep_schedules() -> None:
    """Update the schedules to the lines, if the engine's server has deployments."""
    try:
        if has_workers():
            with client() as prefect:
                remerge = prefect.read_deployment_by_name(full_name("remerge"))
                _schedules(prefect, remerge.id, cron_lines(), [])
    except Unavailable as error:
        warn(f"the schedules were not updated, run `restitch deploy`: {error.message()}")


def cron_lines() -> dict[str, str]:
    """The cron expression of each line's scheduled remerge."""
    space = workspace()
    specs = {line: space.ledger(line).state().spec for line in lines(space.objects)}
    return {line: spec.schedule or DEFAULT_CRON for line, spec in specs.items()}


def _pool(prefect: "SyncPrefectClient", name: str, changes: list[str]) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound

    try:
        prefect.read_work_pool(name)
    except ObjectNotFound:
        prefect.create_work_pool(WorkPoolCreate(name=name, type="process"))
        changes.append(f"work pool {name} made")


def _deployment(prefect: "SyncPrefectClient", flow: DeployedFlow, changes: list[str]) -> "UUID":
    from prefect.exceptions import ObjectNotFound

    name = full_name(flow.flow)
    try:
        present = prefect.read_deployment_by_name(name)
        if (
            present.entrypoint == flow.entrypoint
            and present.work_pool_name == flow.pool
            and present.parameters == flow.optional
            and present.job_variables == JOB_VARIABLES
        ):
            return present.id
    except ObjectNotFound:
        pass
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
    )


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
    prefect: "SyncPrefectClient", ids: Mapping[str, "UUID"], changes: list[str]
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
            core = AutomationCore.model_validate(first.model_dump())
            if _same(core, expected) and first.enabled:
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


def _schedules(
    prefect: "SyncPrefectClient", remerge: "UUID", crons: Mapping[str, str], changes: list[str]
) -> None:
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import CronSchedule

    present = set()
    for schedule in prefect.read_deployment_schedules(remerge):
        line = str((schedule.parameters or {}).get("line"))
        if line in present or crons.get(line) != getattr(schedule.schedule, "cron", None):
            prefect.delete_deployment_schedule(remerge, schedule.id)
            changes.append(f"schedule of {line} removed")
        else:
            present.add(line)
    new = [
        DeploymentScheduleCreate(
            schedule=CronSchedule(cron=cron, timezone="UTC"),
            parameters={"line": line},
            slug=line,
        )
        for line, cron in crons.items()
        if line not in present
    ]
    if new:
        prefect.create_deployment_schedules(remerge, new)
        changes += [f"schedule of {one.slug}: {crons[str(one.slug)]}" for one in new]
