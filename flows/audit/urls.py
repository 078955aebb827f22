"""Where a browser shows a merged version: its run in MLflow, and the flow run that made it.

MLflow is asked over plain HTTP and for a second at most; whoever only looks must neither wait
for a server nor import its client.
"""

import os
from typing import TYPE_CHECKING, Any

from restitch.registry.home import Home
from restitch.registry.mlflow.projection import DIGEST_TAG, experiment_name
from restitch.registry.mlflow.sync import run_address
from restitch.tasks.runtime.run_progress import run_page

if TYPE_CHECKING:
    import httpx

PATIENCE_SECONDS = 1.0


def links(line: str, digest: str, made_by: Any) -> dict[str, str | None]:
    """Addresses of a merged version, by its record's digest; None for what has none.

    `mlflow_filter` finds the run in the line's experiment wherever MLflow is.
    """
    run = made_by.get("flow_run") if isinstance(made_by, dict) else None
    return {
        "mlflow": mlflow_run(line, digest),
        "mlflow_filter": _wanted(digest),
        "prefect": None if run is None else run_page(str(run)),
    }


def mlflow_run(line: str, digest: str, patience: float = PATIENCE_SECONDS) -> str | None:
    """Where a browser shows the run of a merged version; None without a server that tells it.

    Args:
        line: the line's name.
        digest: of the version's record.
        patience: for how many seconds to wait for each answer.
    """
    import httpx

    address = Home.from_environment().mlflow_uri.rstrip("/")
    if not address.startswith(("http://", "https://")):
        return None
    try:
        with _client(f"{address}/api/2.0/mlflow/", patience) as client:
            name = {"experiment_name": experiment_name(line)}
            found = client.get("experiments/get-by-name", params=name).raise_for_status().json()
            experiment = found["experiment"]["experiment_id"]
            search = {"experiment_ids": [experiment], "filter": _wanted(digest)}
            answer = client.post("runs/search", json=search).raise_for_status().json()
            run = answer["runs"][0]
            return run_address(address, experiment, run["info"]["run_id"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError):
        return None  # away, refused, or not there yet


def _wanted(digest: str) -> str:
    return f"tags.`{DIGEST_TAG}` = '{digest}'"


def _client(api: str, patience: float) -> "httpx.Client":
    """With the login that MLflow's own client would use: in the address, or from its variables."""
    import httpx

    headers, auth = {}, None
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    user, word = (os.environ.get(f"MLFLOW_TRACKING_{n}") for n in ("USERNAME", "PASSWORD"))
    if user and word and not token:
        auth = httpx.BasicAuth(user, word)
    return httpx.Client(base_url=api, headers=headers, auth=auth, timeout=patience)
