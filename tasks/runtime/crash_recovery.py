"""Runs that died: what crashes is started again, and what fell silent is marked as crashed.

A worker sees a run of its own end without a word, and calls the flow's hook. When the worker
died too, nobody does: the run stays "running" in Prefect for ever. Whoever remerges the line
next finds that it has shown no sign of life, says so, and sees to what it was about.
"""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from restitch.merging.digests import digest_json
from restitch.tasks.runtime.console import warn
from restitch.tasks.runtime.events import DEPLOYMENT, api, start_run, this_run

# A run tells every so often that it lives; a server that restarts may miss some of it.
HEARTBEAT_SECONDS = 30
SILENT_AFTER = timedelta(seconds=10 * HEARTBEAT_SECONDS)
# Between being taken by a worker and beginning lie seconds.
STUCK_AFTER = timedelta(minutes=2)

# A model that has cost so many processes their life is not tried again, and so many remerges
# of a line that died one after the other are left to the schedule.
DEATHS = 3


def start_again(flow: str, run: str, parameters: Mapping[str, Any]) -> bool:
    """Start a run once more that crashed.

    Returns:
        Whether it was; a remerge that crashes again and again is left to the schedule, and a
        model that does is quarantined when it is onboarded the next time.
    """
    asked = dict(parameters)
    if flow == "remerge":
        asked["attempt"] = int(asked.get("attempt") or 0) + 1
        if asked["attempt"] >= DEATHS:
            return False
    start_run(flow, asked, digest_json(["crashed", run]))
    return True


def mark_silent_runs(line: str) -> None:
    """Mark the line's runs as crashed that have shown no sign of life for long.

    Raises:
        Unavailable: the server is away.
    """
    server, now = api(), datetime.now(UTC)
    for flow in ("onboard", "remerge"):
        for run in server.runs(flow, DEPLOYMENT, "PENDING", "RUNNING"):
            if run["parameters"].get("line") != line or run["id"] == this_run():
                continue
            since = now - datetime.fromisoformat(run["state"]["timestamp"])
            if run["state_type"] == "PENDING":
                why = "taken by a worker that is gone" if since > STUCK_AFTER else None
            else:
                silent = since > SILENT_AFTER and not server.heard_of(run["id"], now - SILENT_AFTER)
                why = "no sign of life: its process or its host is gone" if silent else None
            if why is not None:
                warn(f"run {run['name']} of {flow} is marked as crashed: {why}")
                server.set_state(run["id"], "CRASHED", why)
