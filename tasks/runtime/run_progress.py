"""The workers' progress on a model, for people who wait for it.

It comes from the Prefect server and decides nothing: without an answer there is less to show.
"""

from collections.abc import Iterable
from typing import Any

from restitch.merging.errors import Unavailable
from restitch.registry.redaction import without_credentials
from restitch.tasks.runtime.engine import engine_url
from restitch.tasks.runtime.events import DEPLOYMENT
from restitch.tasks.runtime.prefect_api import PrefectApi

Progress = tuple[str, float | None]


def run_page(run: str) -> str | None:
    """The address at which a browser shows a flow run; None without a server."""
    url = engine_url()
    if url is None:
        return None
    return f"{without_credentials(url).removesuffix('/').removesuffix('/api')}/runs/flow-run/{run}"


def run_progress(line: str, task: str, state: str) -> Progress | None:
    """The run that works on a model: its name, state and page, and its percentage.

    A model in the state `registered` is onboarded, any other is merged.

    Returns:
        None if no such run is under way, or the server does not answer.
    """
    url = engine_url()
    if url is None:
        return None
    server = PrefectApi(url, patience=0)
    try:
        if state == "registered":
            runs = server.runs("onboard", DEPLOYMENT, "RUNNING", "PENDING", "SCHEDULED")
            run = _first(runs, {"line": line, "task": task})
        else:
            run = _first(server.runs("remerge", DEPLOYMENT, "RUNNING", "PENDING"), {"line": line})
        if run is None:
            return None
        text = f"run {run['name']} is {run['state_name'].lower()}, {run_page(run['id'])}"
        return text, server.progress(run["id"])
    except Unavailable:
        return None


def _first(runs: Iterable[dict[str, Any]], parameters: dict[str, str]) -> dict[str, Any] | None:
    """A running one if there is any."""
    matching = [run for run in runs if parameters.items() <= run["parameters"].items()]
    return min(matching, key=lambda run: run["state_type"] != "RUNNING", default=None)
