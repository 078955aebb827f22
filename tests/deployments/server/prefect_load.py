"""A load on a Prefect server like that of `restitch analyze`: runs, states, logs and progress."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import httpx

WRITERS = 8


@contextmanager
def loaded(api: str, writers: int = WRITERS) -> Iterator[None]:
    """Keep a server busy for the length of the context, as flows with many short steps do."""
    over = threading.Event()
    threads = [threading.Thread(target=_write, args=(api, over)) for _ in range(writers)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def connected(api: str) -> httpx.Client:
    """A client with a connection for each request: the server drops one after an error."""
    return httpx.Client(base_url=api, timeout=60, headers={"Connection": "close"})


def made(client: httpx.Client, path: str, body: dict[str, Any]) -> str:
    """Make something on the server, trying again as Prefect's client does, and return its id."""
    while True:
        answer = client.post(path, json=body)
        if answer.is_success:
            return str(answer.json()["id"])


def _write(api: str, over: threading.Event) -> None:
    with connected(api) as client:
        flow = made(client, "/flows/", {"name": f"load-{uuid4()}"})
        run = made(client, "/flow_runs/", {"flow_id": flow})
        artifact: str | None = None
        while not over.is_set():
            step = {"flow_run_id": run, "task_key": "step", "dynamic_key": str(uuid4())}
            task = made(client, "/task_runs/", step)
            for state in ("RUNNING", "COMPLETED"):
                body = {"state": {"type": state}, "force": True}
                client.post(f"/task_runs/{task}/set_state", json=body)
            entry = {"name": "load", "level": 20, "message": "a step", "flow_run_id": run}
            now = datetime.now(UTC).isoformat()
            client.post("/logs/", json=[{**entry, "timestamp": now}])
            if artifact is None:
                new = {"type": "progress", "data": 0, "key": "load", "flow_run_id": run}
                artifact = made(client, "/artifacts/", new)
            else:
                client.patch(f"/artifacts/{artifact}", json={"data": 50})
