"""What flows ask of the Prefect server beside being run by it: events, and runs of others.

The server makes things fast and saves work; nothing here decides what is true. Where it is
away or knows no deployments, events are lost, and the scheduled remerge puts that right.
"""

import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from restitch.merging.digests import digest_json
from restitch.merging.errors import Unavailable
from restitch.tasks.runtime.console import say, warn
from restitch.tasks.runtime.engine import engine_url
from restitch.tasks.runtime.prefect_api import PrefectApi

DEPLOYMENT = "restitch"
MODEL_REGISTERED = "restitch.model.registered"
MASK_READY = "restitch.mask.ready"

MOST_STARTS = 20

# A worker outlives a restart of the server; nobody waits at a terminal for it.
WORKERS_PATIENCE = 60.0

_FINAL = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")


def api() -> PrefectApi:
    """The engine's server; asked for only where the engine is on."""
    url = engine_url()
    assert url is not None, "the engine is off"
    return PrefectApi(url, WORKERS_PATIENCE) if is_workers_run() else PrefectApi(url)


def has_workers() -> bool:
    """Whether the engine's server hands work to workers: it knows our deployments."""
    return engine_url() is not None and api().deployment(f"onboard/{DEPLOYMENT}") is not None


def announce(event: str, line: str, task: str, version: int | None, **facts: Any) -> bool:
    """Tell the server what happened, which starts the next run.

    Returns:
        Whether it took the event. Where not, the scheduled remerge finds what happened.
    """
    if engine_url() is None:
        return False
    told = {
        "id": str(uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": event,
        "resource": {
            "prefect.resource.id": f"restitch.model.{line}.{task}",
            "prefect.resource.name": f"{line}.{task}",
        },
        "payload": {"line": line, "task": task, "version": version, **facts},
    }
    try:
        api().emit([told])
    except Unavailable as error:
        warn(f"{event} of {line}.{task} was not told, the schedule finds it: {error.message()}")
        return False
    return True


def start_run(
    flow: str, parameters: Mapping[str, Any], key: str, at: datetime | None = None
) -> None:
    """Start a run of a deployment; once for a key, unless what it started came to nothing.

    Args:
        flow: the flow's name.
        parameters: those of the run.
        key: digest of what the run would be about.
        at: when it begins; now without.

    Raises:
        Unavailable: the server is away, or has no such deployment.
    """
    server = api()
    deployment = server.deployment(f"{flow}/{DEPLOYMENT}")
    if deployment is None:
        raise Unavailable(
            f"the Prefect server has no deployment {flow}/{DEPLOYMENT}",
            hint="make it with `restitch deploy`",
        )
    for _ in range(MOST_STARTS):
        run = server.create_run(deployment["id"], parameters, key, at)
        if run["state_type"] not in _FINAL:
            return
        key = digest_json([key, run["id"]])  # that one is over, and it is asked for again


def is_queued(flow: str, parameters: Mapping[str, Any]) -> bool:
    """Whether a run of a deployment with these parameters waits for a worker or is taken."""
    return any(
        all(run["parameters"].get(name) == value for name, value in parameters.items())
        for run in api().runs(flow, DEPLOYMENT, "SCHEDULED", "PENDING")
        if _is_due(run)
    )


def run_ended(run: str) -> bool:
    """Whether a flow run is over, as far as the server knows; one that it forgot is."""
    found = api().run(run)
    return found is None or found["state_type"] in _FINAL


def mark_crashed(run: str, message: str) -> None:
    """Say of a run whose process is known to be gone that it crashed."""
    if not run_ended(run):
        api().set_state(run, "CRASHED", message)


def this_run() -> str | None:
    """The id of the flow run that this code runs in."""
    # Who has not imported Prefect is in no run of its, and should not pay for the import.
    if engine_url() is None or "prefect" not in sys.modules:
        return None
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    return None if context is None or context.flow_run is None else str(context.flow_run.id)


def cancel_queued(line: str) -> None:
    """Cancel the line's remerges that wait for a worker: this run sees what they would."""
    server, me = api(), this_run()
    for run in server.runs("remerge", DEPLOYMENT, "SCHEDULED"):
        asked = run["parameters"]
        if _is_due(run) and asked.get("line") == line and not asked.get("force"):
            server.set_state(run["id"], "CANCELLED", f"run {me} does its work")
            say(f"cancelled the waiting remerge {run['name']}: this run does its work")


def is_workers_run() -> bool:
    """Whether this code runs in a run that a worker has begun."""
    if this_run() is None:
        return False
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    return bool(context and context.flow_run and context.flow_run.deployment_id)


def _is_due(run: Mapping[str, Any]) -> bool:
    """Whether a run is under way or could be: not one that the schedule has planned."""
    if run["state_type"] != "SCHEDULED" or run["expected_start_time"] is None:
        return True
    return datetime.fromisoformat(run["expected_start_time"]) <= datetime.now(UTC)
