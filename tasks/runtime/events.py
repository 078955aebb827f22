"""Emit events to the Prefect server, and start, inspect and cancel runs.

The server only makes things fast; the store decides what is true. Without a server, or without
our deployments on it, events are lost and the scheduled remerge does the work later.
"""

import sys
from collections.abc import Iterable, Mapping
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
LINE = "restitch.line"  # followed by the kind of event, such as `promoted`

MOST_STARTS = 20
# The runs at once in a pool that starts a Job for each run, and has no limit of its own.
MOST_JOBS = 8

# Long enough for a restart of the server: nobody waits at a terminal for a worker.
WORKER_PATIENCE = 60.0

_FINAL = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")


def api() -> PrefectApi:
    """The API of the engine's server; the engine must be on."""
    url = engine_url()
    assert url is not None, "the engine is off"
    return PrefectApi(url, WORKER_PATIENCE) if is_workers_run() else PrefectApi(url)


def has_workers() -> bool:
    """True if the engine's server has our deployments, and so hands work to workers."""
    return engine_url() is not None and api().deployment(f"onboard/{DEPLOYMENT}") is not None


def announce(event: str, line: str, task: str, version: int | None, **facts: Any) -> bool:
    """Emit an event that starts the next run.

    False if the server did not take it: the scheduled remerge does the work later.
    """
    payload = {"line": line, "task": task, "version": version, **facts}
    lost = "the scheduled remerge picks it up"
    return _emit(event, f"model.{line}.{task}", f"{line}.{task}", payload, lost)


def announce_act(event: str, line: str, **facts: Any) -> bool:
    """Emit an event about an act of a line, for automations that people make.

    False if the server did not take it: nobody emits it again.
    """
    payload = {"line": line, **facts}
    return _emit(f"{LINE}.{event}", f"line.{line}", line, payload, "no automation sees it")


def _emit(event: str, resource: str, name: str, payload: Mapping[str, Any], lost: str) -> bool:
    if engine_url() is None:
        return False
    message = {
        "id": str(uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": event,
        "resource": {
            "prefect.resource.id": f"restitch.{resource}",
            "prefect.resource.name": name,
        },
        "payload": dict(payload),
    }
    try:
        api().emit([message])
    except Unavailable as error:
        warn(f"event {event} for {name} was not sent, {lost}: {error.message()}")
        return False
    return True


def start_run(
    flow: str, parameters: Mapping[str, Any], key: str, at: datetime | None = None
) -> None:
    """Start a run of a deployment, now or `at` a time, unless one with this key is under way.

    The key is a digest of the run's purpose.

    Raises:
        Unavailable: the server cannot be reached, or has no such deployment.
    """
    server = api()
    deployment = server.deployment(f"{flow}/{DEPLOYMENT}")
    if deployment is None:
        raise Unavailable(
            f"the Prefect server has no deployment {flow}/{DEPLOYMENT}",
            hint="create it with `restitch deploy`",
        )
    for _ in range(MOST_STARTS):
        run = server.create_run(deployment["id"], parameters, key, at)
        if run["state_type"] not in _FINAL:
            return
        key = digest_json([key, run["id"]])  # that run is over: ask for another


def call_helpers(line: str, offer: str, most: int) -> tuple[str, ...]:
    """Start runs in which idle workers help with work that this process has offered.

    Args:
        line: the line of the work.
        offer: its identity.
        most: the number of runs that have something to do.

    Returns:
        The runs: one for each other worker that is online, or for each Job that the pool may start.

    Raises:
        Unavailable: the server cannot be reached.
    """
    server = None if engine_url() is None else api()
    deployment = None if server is None else server.deployment(f"assist/{DEPLOYMENT}")
    if server is None or deployment is None:
        return ()
    pool = server.work_pool(deployment["work_pool_name"])
    if pool is None:
        return ()
    if pool["type"] == "process":
        free = len(server.online_workers(pool["name"]))
    else:
        free = pool["concurrency_limit"] or MOST_JOBS
    count = min(most, free - is_workers_run())
    parameters = {"line": line, "offer": offer}
    asked = str(uuid4())  # another call asks again
    keys = (digest_json([asked, number]) for number in range(count))
    return tuple(str(server.create_run(deployment["id"], parameters, key)["id"]) for key in keys)


def dismiss_helpers(runs: Iterable[str]) -> None:
    """Cancel those runs of helpers that no worker has begun.

    Raises:
        Unavailable: the server cannot be reached.
    """
    for run in runs:
        known = api().run(run)
        if known is not None and known["state_type"] == "SCHEDULED":
            api().set_state(run, "CANCELLED", "the work is done")


def is_queued(flow: str, parameters: Mapping[str, Any]) -> bool:
    """True if a run with these parameters waits for a worker, or was taken by one."""
    return any(
        all(run["parameters"].get(name) == value for name, value in parameters.items())
        for run in api().runs(flow, DEPLOYMENT, "SCHEDULED", "PENDING")
        if _is_due(run)
    )


def run_ended(run: str) -> bool:
    """True if a flow run is over; one that the server does not know counts as over."""
    known = api().run(run)
    return known is None or known["state_type"] in _FINAL


def mark_crashed(run: str, message: str) -> None:
    """Mark a run as crashed whose process is known to be gone."""
    if not run_ended(run):
        api().set_state(run, "CRASHED", message)


def this_run() -> str | None:
    """The id of the current flow run; None outside of one."""
    run = _flow_run()
    return None if run is None else str(run.id)


def cancel_queued(line: str) -> None:
    """Cancel the line's remerges that wait for a worker: this run does their work."""
    server, me = api(), this_run()
    for run in server.runs("remerge", DEPLOYMENT, "SCHEDULED"):
        parameters = run["parameters"]
        if _is_due(run) and parameters.get("line") == line and not parameters.get("force"):
            server.set_state(run["id"], "CANCELLED", f"run {me} does its work")
            say(f"cancelled the queued remerge {run['name']}: this run does its work")


def is_workers_run() -> bool:
    """True if a worker started the current flow run."""
    run = _flow_run()
    return run is not None and run.deployment_id is not None


def workers_flow() -> str | None:
    """The name of the current flow, if a worker started its run."""
    if not is_workers_run():
        return None
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    return None if context is None or context.flow is None else str(context.flow.name)


def is_scheduled_run() -> bool:
    """True if a schedule started the current flow run."""
    run = _flow_run()
    return run is not None and bool(run.auto_scheduled)


def scheduled_by() -> str | None:
    """The slug of the schedule that started the current flow run."""
    run = _flow_run()
    return None if run is None or run.created_by is None else run.created_by.display_value


def _flow_run() -> Any:
    # Without Prefect imported there is no run, and importing it here would cost seconds.
    if engine_url() is None or "prefect" not in sys.modules:
        return None
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    return None if context is None else context.flow_run


def _is_due(run: Mapping[str, Any]) -> bool:
    """True if a run has started or could start now, unlike one that is scheduled for later."""
    if run["state_type"] != "SCHEDULED" or run["expected_start_time"] is None:
        return True
    return datetime.fromisoformat(run["expected_start_time"]) <= datetime.now(UTC)
