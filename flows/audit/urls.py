"""Addresses of a merged version in a browser: its run in MLflow, and the flow run that made it.

MLflow is queried over plain HTTP with a timeout of one second, so that `show` neither waits for a
server nor imports the MLflow client.
"""

import os
from typing import Any

from restitch.registry.home import Home
from restitch.registry.mlflow.connection import run_address
from restitch.registry.mlflow.projection import DIGEST_TAG, experiment_name
from restitch.tasks.runtime.run_progress import run_page

PATIENCE_SECONDS = 1.0


def links(line: str, digest: str, made_by: Any) -> dict[str, str | None]:
    """The addresses of a merged version, by its record's digest; None for an unknown address.

    `mlflow_filter` is a search that finds the run in the line's experiment.
    """
    run = made_by.get("flow_run") if isinstance(made_by, dict) else None
    return {
        "mlflow": mlflow_run(line, digest),
        "mlflow_filter": _run_filter(digest),
        "prefect": None if run is None else run_page(str(run)),
    }


def mlflow_run(line: str, digest: str, patience: float = PATIENCE_SECONDS) -> str | None:
    """The address of a merged version's run, by its record's digest; None if it is unknown.

    `patience` is the timeout of each request in seconds.
    """
    import httpx

    address = Home.from_environment().mlflow_uri.rstrip("/")
    if not address.startswith(("http://", "https://")):
        return None
    api = f"{address}/api/2.0/mlflow/"
    try:
        with httpx.Client(base_url=api, timeout=patience, **_login()) as client:
            name = {"experiment_name": experiment_name(line)}
            reply = client.get("experiments/get-by-name", params=name).raise_for_status().json()
            experiment = reply["experiment"]["experiment_id"]
            search = {"experiment_ids": [experiment], "filter": _run_filter(digest)}
            reply = client.post("runs/search", json=search).raise_for_status().json()
            run = reply["runs"][0]
            return run_address(address, experiment, run["info"]["run_id"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError):
        return None  # no server, no access, or no such run yet


def _run_filter(digest: str) -> str:
    return f"tags.`{DIGEST_TAG}` = '{digest}'"


def _login() -> dict[str, Any]:
    """The login that MLflow's own client would use, as arguments of a client."""
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return {"headers": {"Authorization": f"Bearer {token}"}}
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{n}") for n in ("USERNAME", "PASSWORD"))
    return {"auth": (user, password)} if user and password else {}
