"""A loopback server that takes notifications of apprise's `json://`, for tests."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class NotifyServer:
    """The server.

    Attributes:
        host: its host and port.
        status: the status of its answers.
        delay: seconds before each part of an answer.
        messages: the bodies of all requests, in order.
        paths: the path of each request.
    """

    host: str = ""
    status: int = 200
    delay: float = 0.0
    messages: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    @property
    def titles(self) -> list[str]:
        """The titles of all messages."""
        return [message["title"] for message in self.messages]


@contextmanager
def notify_server() -> Iterator[NotifyServer]:
    """Run the server while the context is open."""
    fake = NotifyServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            fake.messages.append(json.loads(self.rfile.read(length)))
            fake.paths.append(self.path)
            self.send_response(fake.status)
            for _ in range(20 if fake.delay else 0):  # a header now and then: no read times out
                time.sleep(fake.delay)
                self.send_header("X-Wait", "a little")
                self.flush_headers()
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        fake.host = f"127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield fake
        server.shutdown()
