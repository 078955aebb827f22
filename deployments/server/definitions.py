"""The pools, deployments, automations and schedules of a Prefect server, as data.

    event restitch.model.registered --> run of `onboard`     on the pool `gpu`
    event restitch.mask.ready -------> run of `remerge`      on the same pool, or another
    cron, one schedule per line -----> run of `remerge`
    a remerge that takes long -------> runs of `assist`      on the pool of `remerge`

`server.deploy` brings a server to this state. A worker needs the package and, in its environment,
the addresses; no code is pulled.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from restitch.tasks.runtime.crash_recovery import HEARTBEAT_SECONDS
from restitch.tasks.runtime.events import DEPLOYMENT, MASK_READY, MODEL_REGISTERED

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.events.schemas.automations import AutomationCore

# Starts the engine at once. Prefect's default command first looks for code to pull, which costs
# each run more than a second. A worker finds this `python` on its path.
JOB_VARIABLES = {"command": "python -m prefect.engine"}

SERVER_ENVIRONMENT = {
    # In memory, a lease that is held when the server dies would never end.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
        "prefect.server.concurrency.lease_storage.filesystem"
    ),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_SERVER_LEVEL": "WARNING",
    "DO_NOT_TRACK": "1",
}

WORKER_ENVIRONMENT = {
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
    "PREFECT_WORKER_QUERY_SECONDS": "1",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "restitch,transformers,datasets",
}


@dataclass(frozen=True)
class DeployedFlow:
    """A flow that workers run.

    Attributes:
        flow: its name.
        entrypoint: the name by which a worker imports it.
        pool: the work pool.
        optional: parameters that a run may leave out, with their defaults.
    """

    flow: str
    entrypoint: str
    pool: str
    description: str
    required: tuple[str, ...]
    optional: dict[str, Any]


def flows(pool: str, remerge_pool: str) -> tuple[DeployedFlow, ...]:
    """The deployments: onboard, remerge, and assist, which helps a remerge."""
    return (
        DeployedFlow(
            flow="onboard",
            entrypoint="restitch.deployments.server.entry.onboard_flow",
            pool=pool,
            description="Validate, localize and measure one finetuned model.",
            required=("line", "task"),
            optional={"version": None, "mlflow_version": None},
        ),
        DeployedFlow(
            flow="remerge",
            entrypoint="restitch.deployments.server.entry.remerge_flow",
            pool=remerge_pool,
            description="Bring a line's merged model up to date, and catch up with lost events.",
            required=("line",),
            optional={"force": False, "attempt": 0},
        ),
        DeployedFlow(
            flow="assist",
            entrypoint="restitch.deployments.server.entry.assist_flow",
            pool=remerge_pool,
            description="Take a part of the work of a remerge that takes long.",
            required=("line", "offer"),
            optional={},
        ),
    )


def automations(onboard: "UUID", remerge: "UUID") -> "list[AutomationCore]":
    """The automations that start runs on events.

    There are only two, because every automation writes to the database on every event. On SQLite
    under load such writes collide and are retried; one crash was seen to start four runs. After
    a crash the worker starts the run again, or else the next remerge does.
    """
    return [
        _on_event(
            "restitch: onboard a registered model",
            MODEL_REGISTERED,
            onboard,
            {
                "line": "{{ event.payload.line }}",
                "task": "{{ event.payload.task }}",
                "version": _json("event.payload.version | default(none)"),
                "mlflow_version": _json("event.payload.mlflow_version | default(none)"),
            },
        ),
        _on_event(
            "restitch: merge a new mask",
            MASK_READY,
            remerge,
            {"line": "{{ event.payload.line }}"},
        ),
    ]


def _json(expression: str) -> dict[str, Any]:
    """A parameter that keeps its JSON type and may be missing from an event."""
    return {
        "__prefect_kind": "json",
        "value": {
            "__prefect_kind": "jinja",
            "template": "{{ (" + expression + ") | tojson }}",
        },
    }


def _on_event(
    name: str, event: str, deployment: "UUID", parameters: dict[str, Any]
) -> "AutomationCore":
    from prefect.events.actions import RunDeployment
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    return AutomationCore(
        name=name,
        trigger=EventTrigger(
            expect={event},
            posture=Posture.Reactive,
            threshold=1,
            within=timedelta(0),
        ),
        actions=[RunDeployment(deployment_id=deployment, parameters=parameters)],
    )


# No line has such a name, so it is no other line's slug.
_PAUSED_SLUG = " (paused by restitch)"


def slug_of(line: str, *, paused: bool) -> str:
    """The slug of a line's schedule; it shows whether a pause of the line switched it off."""
    return f"{line}{_PAUSED_SLUG if paused else ''}"


def line_of_slug(slug: str) -> str:
    """The line of a schedule."""
    return slug.removesuffix(_PAUSED_SLUG)


def full_name(flow: str) -> str:
    """The name of a flow's deployment in Prefect."""
    return f"{flow}/{DEPLOYMENT}"
