"""Bring a Prefect server to what `restitch.deployments.server.definitions` says; again changes nothing.

Pools, deployments and automations are found by their names, schedules by their line. What is
there and right is left alone, so that no trigger is away for a moment; what is there and
differs is replaced; what belongs to a line that is gone is removed.
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
    """Prefect's own client of the engine's server.

    Raises:
        Unavailable: it cannot be reached, or refuses.
    """
    url = engine_url()
    if url is None:
        raise BadInput(
            "there is no Prefect server to deploy to",
            expected="PREFECT_API_URL, or a stack that is up",
            hint="set PREFECT_API_URL, or run `restitch up`",
        )
    os.environ["PREFECT_API_URL"] = url  # before Prefect reads its settings
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        with get_client(sync_client=True) as found:
            yield found
    except (httpx.HTTPError, PrefectHTTPStatusError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "Failed to reach API" not in str(error):
            raise
        raise Unavailable(
            f"the Prefect server at {without_credentials(url)} cannot be used",
            found=without_credentials(str(error))[:300] or type(error).__name__,
            hint="start it; `restitch doctor` tells what runs",
        ) from None


@dataclass(frozen=True)
class Deployed:
    """What `deploy` did.

    Attributes:
        pools: the work pools that workers may serve.
        schedules: the cron line of each line.
        changes: what had to be changed.
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
        pool: where models are onboarded.
        remerge_pool: where lines are merged; the same by default.

    Raises:
        Unavailable: the server is away.
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
    """Bring the schedules in step with the lines, where the engine's server has deployments."""
    try:
        if has_workers():
            with client() as prefect:
                remerge = prefect.read_deployment_by_name(f"remerge/{DEPLOYMENT}")
                _schedules(prefect, remerge.id, cron_lines(), [])
    except Unavailable as error:
        warn(f"the schedules are as before, `restitch deploy` mends them: {error.message()}")


def cron_lines() -> dict[str, str]:
    """When each line of the store is remerged whatever happens."""
    space = workspace()
    heads = {line: space.ledger(line).state() for line in lines(space.objects)}
    return {line: line_state.spec.schedule or DEFAULT_CRON for line, line_state in heads.items()}


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

    name = f"{flow.flow}/{DEPLOYMENT}"
    try:
        found = prefect.read_deployment_by_name(name)
        if (
            found.entrypoint == flow.entrypoint
            and found.work_pool_name == flow.pool
            and found.parameters == flow.optional
            and found.job_variables == JOB_VARIABLES
        ):
            return found.id
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
    """What Prefect checks before it makes a run."""
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
    for found in prefect.read_automations():
        present.setdefault(found.name, []).append(found)
    for wanted in automations(ids["onboard"], ids["remerge"]):
        first, *others = present.pop(wanted.name, None) or [None]
        for other in others:
            prefect.delete_automation(other.id)
        if first is not None:
            mine = AutomationCore.model_validate(first.model_dump())
            if _same(mine, wanted) and first.enabled:
                continue
            prefect.delete_automation(first.id)
        prefect.create_automation(wanted)
        changes.append(f"automation '{wanted.name}'")
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
    prefect: "SyncPrefectClient", remerge: "UUID", wanted: Mapping[str, str], changes: list[str]
) -> None:
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import CronSchedule

    present = {}
    for found in prefect.read_deployment_schedules(remerge):
        line = str((found.parameters or {}).get("line"))
        if line in present or wanted.get(line) != getattr(found.schedule, "cron", None):
            prefect.delete_deployment_schedule(remerge, found.id)
            changes.append(f"schedule of {line} removed")
        else:
            present[line] = found
    new = [
        DeploymentScheduleCreate(
            schedule=CronSchedule(cron=cron, timezone="UTC"),
            parameters={"line": line},
            slug=line,
        )
        for line, cron in wanted.items()
        if line not in present
    ]
    if new:
        prefect.create_deployment_schedules(remerge, new)
        changes += [f"schedule of {one.slug}: {wanted[str(one.slug)]}" for one in new]
