"""Restart runs that crashed, and mark runs as crashed whose process is gone.

When a run's process dies, its worker notices and calls the flow's crash hook. When the worker
dies too, Prefect shows the run as "running" for ever. The next remerge of the line therefore
looks for runs without a recent heartbeat, marks them as crashed and takes over their work.
"""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from restitch.merging.digests import digest_json
from restitch.tasks.runtime.console import warn
from restitch.tasks.runtime.events import DEPLOYMENT, api, start_run, this_run

# A server that restarts may miss some heartbeats.
HEARTBEAT_SECONDS = 30
SILENT_AFTER = timedelta(seconds=10 * HEARTBEAT_SECONDS)
# A run that a worker has taken normally begins within seconds.
STUCK_AFTER = timedelta(minutes=2)

# A model is not tried again after this many crashes, and this many crashes of a line's remerge
# in a row are left to the schedule.
MAX_CRASHES = 3


def restart(flow: str, run: str, parameters: Mapping[str, Any]) -> bool:
    """Start a crashed run again.

    Returns:
        False when a remerge crashed too often: the schedule tries it later. A model that crashes
        too often is quarantined by its next onboarding.
    """
    parameters = dict(parameters)
    if flow == "remerge":
        parameters["attempt"] = int(parameters.get("attempt") or 0) + 1
        if parameters["attempt"] >= MAX_CRASHES:
            return False
    start_run(flow, parameters, digest_json(["crashed", run]))
    return True


def mark_silent_runs(line: str) -> None:
    """Mark those runs of a line as crashed that have sent no heartbeat for long.

    Raises:
        Unavailable: the Prefect server cannot be reached.
    """
    server, now = api(), datetime.now(UTC)
    for flow in ("onboard", "remerge", "assist"):
        for run in server.runs(flow, DEPLOYMENT, "PENDING", "RUNNING"):
            if run["parameters"].get("line") != line or run["id"] == this_run():
                continue
            since = now - datetime.fromisoformat(run["state"]["timestamp"])
            if run["state_type"] == "PENDING":
                reason = "the worker that took it is gone" if since > STUCK_AFTER else None
            else:
                silent = since > SILENT_AFTER and not server.has_heartbeat(
                    run["id"], now - SILENT_AFTER
                )
                reason = "no heartbeat: its process or its host is gone" if silent else None
            if reason is not None:
                warn(f"marked run {run['name']} of {flow} as crashed: {reason}")
                server.set_state(run["id"], "CRASHED", reason)
