"""A fake Prefect server for tests: it records requests and returns prepared answers."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NEW = {"id": "new", "state_type": "SCHEDULED"}


@dataclass
class FakePrefect:
    """The server.

    Attributes:
        url: the value for `PREFECT_API_URL`.
        answers: status and JSON by "METHOD /path"; all other requests get 404.
        requests: every request as (method and path, JSON or None, headers), in order.
    """

    url: str = ""
    answers: dict[str, tuple[int, Any]] = field(default_factory=dict)
    requests: list[tuple[str, Any, dict[str, str]]] = field(default_factory=list)

    def knows_deployments(self) -> None:
        """Answer like a server that has our deployments and accepts events."""
        for flow in ("onboard", "remerge", "assist"):
            name = f"GET /deployments/name/{flow}/restitch"
            self.answers[name] = (200, {"id": f"the-{flow}", "work_pool_name": "gpu"})
            self.answers[f"POST /deployments/the-{flow}/create_flow_run"] = (201, NEW)
        self.answers["POST /events"] = (204, None)
        self.answers["POST /flow_runs/filter"] = (200, [])

    def bodies(self, request: str) -> list[Any]:
        """The JSON bodies of all requests to one method and path."""
        return [body for sent, body, _ in self.requests if sent == request]


@contextmanager
def fake_prefect() -> Iterator[FakePrefect]:
    """Run the server while the context is open."""
    fake = FakePrefect()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer("GET")

        def do_POST(self) -> None:
            self.answer("POST")

        def do_PATCH(self) -> None:
            self.answer("PATCH")

        def answer(self, method: str) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            request = f"{method} {self.path.removeprefix('/api')}"
            fake.requests.append((request, body, dict(self.headers)))
            status, found = fake.answers.get(request, (404, {"detail": "Not Found"}))
            data = b"" if found is None else json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        fake.url = f"http://127.0.0.1:{server.server_address[1]}/api"
        try:
            yield fake
        finally:
            server.shutdown()
            thread.join()
