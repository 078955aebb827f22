"""Where a browser shows a merged version: its run in MLflow, and the flow run that made it.

MLflow is asked over plain HTTP and for a second at most; whoever only looks must neither wait
for a server nor import its client.
"""

import json
import os
import urllib.request
from base64 import b64encode
from typing import Any
from urllib.parse import quote

from registry.catalog import run_address, without_credentials
from registry.home import Home
from registry.image import DIGEST_TAG, experiment_name
from tasks.engine import engine_url

PATIENCE_SECONDS = 1.0


def links(line: str, digest: str, made_by: Any) -> dict[str, str | None]:
    """Addresses of a merged version, by its record's digest; None for what has none.

    `mlflow_filter` finds the run in the line's experiment wherever MLflow is.
    """
    wanted = f"tags.`{DIGEST_TAG}` = '{digest}'"
    run = made_by.get("flow_run") if isinstance(made_by, dict) else None
    return {
        "mlflow": _mlflow_run(line, wanted),
        "mlflow_filter": wanted,
        "prefect": None if run is None else _prefect_run(str(run)),
    }


def _prefect_run(run: str) -> str | None:
    api = engine_url()
    if api is None:
        return None
    return f"{without_credentials(api).removesuffix('/').removesuffix('/api')}/runs/flow-run/{run}"


def _mlflow_run(line: str, wanted: str) -> str | None:
    address = Home.from_environment().mlflow_uri.rstrip("/")
    if not address.startswith(("http://", "https://")):
        return None
    api = f"{address}/api/2.0/mlflow"
    try:
        name = quote(experiment_name(line))
        found = _asked(f"{api}/experiments/get-by-name?experiment_name={name}")
        experiment = found["experiment"]["experiment_id"]
        search = {"experiment_ids": [experiment], "filter": wanted, "max_results": 1}
        [run] = _asked(f"{api}/runs/search", search).get("runs", [])
    except (OSError, ValueError, KeyError):  # away, refused, or not there yet
        return None
    return run_address(address, experiment, run["info"]["run_id"])


def _asked(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **_login()})
    with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:
        return json.loads(answer.read())


def _login() -> dict[str, str]:
    """What MLflow's own client would send, from the same variables."""
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    if token:
        return {"Authorization": f"Bearer {token}"}
    user, word = (os.environ.get(f"MLFLOW_TRACKING_{n}") for n in ("USERNAME", "PASSWORD"))
    if not (user and word):
        return {}
    return {"Authorization": f"Basic {b64encode(f'{user}:{word}'.encode()).decode()}"}
