"""A small client for the Prefect server's HTTP API.

Prefect's own client takes seconds to import and to connect, too long for a command that only emits
an event. Credentials come from Prefect's variables `PREFECT_API_KEY` and `PREFECT_API_AUTH_STRING`
and never appear in a message.
"""

import os
import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from restitch.merging.errors import Unavailable
from restitch.registry.redaction import without_credentials

if TYPE_CHECKING:
    import httpx

TIMEOUT_SECONDS, PAUSE_SECONDS = 20.0, 0.5
# For a server that answers but is busy: each attempt may wait seconds for its database.
BUSY_SECONDS = 30.0
_BUSY = (429, 502, 503, 504)
_NOT_FOUND, _CONFLICT, _LOCKED = 404, 409, 423

Json = dict[str, Any]


class PrefectApi:
    """The API of a Prefect server.

    Every method raises `Unavailable` when the server cannot be reached or refuses.

    Args:
        url: its address, as in `PREFECT_API_URL`.
        patience: for how many seconds to retry while it cannot be reached.
    """

    def __init__(self, url: str, patience: float = 5.0) -> None:
        self.url = url.rstrip("/")
        self.patience = patience

    def emit(self, events: Iterable[Json]) -> None:
        """Emit events; the server ignores an id that it has seen."""
        self._send("POST", "/events", json=list(events))

    def deployment(self, name: str) -> Json | None:
        """A deployment by its full name `flow/name`, or None."""
        return self._read(f"/deployments/name/{name}")

    def set_entrypoint(self, deployment: str, entrypoint: str) -> None:
        """Change where workers load a deployment's flow from."""
        self._send("PATCH", f"/deployments/{deployment}", json={"entrypoint": entrypoint})

    def create_run(
        self,
        deployment: str,
        parameters: Mapping[str, Any],
        key: str,
        at: datetime | None = None,
    ) -> Json:
        """Start a run of a deployment, now or later; the same key returns the same run."""
        state: Json = {"type": "SCHEDULED"}
        if at is not None:
            state["state_details"] = {"scheduled_time": at.isoformat()}
        body = {"parameters": dict(parameters), "idempotency_key": key, "state": state}
        path = f"/deployments/{deployment}/create_flow_run"
        return dict(self._send("POST", path, json=body).json())

    def work_pool(self, name: str) -> Json | None:
        """A work pool by its name, or None."""
        return self._read(f"/work_pools/{quote(name)}")

    def online_workers(self, pool: str) -> list[str]:
        """The names of a pool's workers that have sent a heartbeat lately, at most 200."""
        path = f"/work_pools/{quote(pool)}/workers/filter"
        answer = self._send("POST", path, json={"limit": 200}, allow=(_NOT_FOUND,))
        workers = [] if answer.status_code == _NOT_FOUND else answer.json()
        return [worker["name"] for worker in workers if worker["status"] == "ONLINE"]

    def runs(self, flow: str, deployment: str, *states: str) -> list[Json]:
        """The runs of a deployment in the given states, at most 200."""
        body = {
            "flows": {"name": {"any_": [flow]}},
            "deployments": {"name": {"any_": [deployment]}},
            "flow_runs": {"state": {"type": {"any_": list(states)}}},
            "limit": 200,
        }
        return list(self._send("POST", "/flow_runs/filter", json=body).json())

    def run(self, run: str) -> Json | None:
        """A run by its id, or None."""
        return self._read(f"/flow_runs/{run}")

    def progress(self, run: str) -> float | None:
        """The percentage in a run's newest progress artifact, or None."""
        body = {
            "flow_runs": {"id": {"any_": [run]}},
            "artifacts": {"type": {"any_": ["progress"]}},
            "sort": "CREATED_DESC",
            "limit": 1,
        }
        artifacts = self._send("POST", "/artifacts/filter", json=body).json()
        return float(artifacts[0]["data"]) if artifacts else None

    def set_state(self, run: str, state: str, message: str) -> None:
        """Request a state for a run; the server may refuse the transition."""
        body = {"state": {"type": state, "message": message}, "force": False}
        self._send("POST", f"/flow_runs/{run}/set_state", json=body)

    def has_heartbeat(self, run: str, since: datetime) -> bool:
        """True if a run has sent a heartbeat since a time."""
        body = {
            "filter": {
                "event": {"name": ["prefect.flow-run.heartbeat"]},
                "resource": {"id": [f"prefect.flow-run.{run}"]},
                "occurred": {"since": since.isoformat()},
            },
            "limit": 1,
        }
        return bool(self._send("POST", "/events/filter", json=body).json()["events"])

    def ensure_limit(self, name: str, limit: int) -> None:
        """Create a concurrency limit if it does not exist."""
        # Look first: the server logs a traceback when a limit is created twice.
        if self._read(f"/v2/concurrency_limits/{name}") is None:
            body = {"name": name, "limit": limit}
            self._send("POST", "/v2/concurrency_limits/", json=body, allow=(_CONFLICT,))

    def take_lease(self, limit: str, seconds: float, run: str) -> str | None:
        """Lease a slot of a limit; None if none is free."""
        body = {
            "names": [limit],
            "slots": 1,
            "mode": "concurrency",
            "lease_duration": seconds,
            "holder": {"type": "flow_run", "id": run},
        }
        path = "/v2/concurrency_limits/increment-with-lease"
        answer = self._send("POST", path, json=body, allow=(_LOCKED,))
        return None if answer.status_code == _LOCKED else str(answer.json()["lease_id"])

    def renew_lease(self, lease: str, seconds: float) -> None:
        """Extend a lease."""
        path = f"/v2/concurrency_limits/leases/{lease}/renew"
        self._send("POST", path, json={"lease_duration": seconds})

    def release_lease(self, lease: str) -> None:
        """End a lease; one that has already ended is no error."""
        path = "/v2/concurrency_limits/decrement-with-lease"
        self._send("POST", path, json={"lease_id": lease})

    def free_limit(self, name: str) -> None:
        """Mark all slots of a limit as free."""
        self._send("PATCH", f"/v2/concurrency_limits/{name}", json={"active_slots": 0})

    def _read(self, path: str) -> Json | None:
        answer = self._send("GET", path, allow=(_NOT_FOUND,))
        return None if answer.status_code == _NOT_FOUND else dict(answer.json())

    def _send(
        self, method: str, path: str, *, json: Any = None, allow: tuple[int, ...] = ()
    ) -> "httpx.Response":
        import httpx

        began = time.monotonic()
        while True:
            patience = self.patience
            try:
                answer = self._client.request(method, self.url + path, json=json)
            except httpx.HTTPError as error:
                found = type(error).__name__
            else:
                if answer.is_success or answer.status_code in allow:
                    return answer
                found = f"status {answer.status_code} for {path}: {answer.text[:200]}"
                # A busy server on SQLite answers like this, and succeeds a moment later.
                if answer.status_code not in _BUSY:
                    raise self._unavailable(found)
                patience = max(patience, BUSY_SECONDS)
            if time.monotonic() + PAUSE_SECONDS > began + patience:
                raise self._unavailable(found)
            time.sleep(PAUSE_SECONDS)

    def _unavailable(self, found: str) -> Unavailable:
        return Unavailable(
            f"the Prefect server at {without_credentials(self.url)} cannot be used",
            found=found,
            hint="start the server; `restitch doctor` shows what is running",
        )

    @cached_property
    def _client(self) -> "httpx.Client":
        import httpx

        headers, auth = {}, None
        if os.environ.get("PREFECT_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['PREFECT_API_KEY']}"
        elif os.environ.get("PREFECT_API_AUTH_STRING"):
            user, _, word = os.environ["PREFECT_API_AUTH_STRING"].partition(":")
            auth = httpx.BasicAuth(user, word)
        return httpx.Client(
            headers=headers, auth=auth, timeout=TIMEOUT_SECONDS, follow_redirects=True
        )
