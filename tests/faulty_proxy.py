"""A proxy between the tests and an S3 server that injects network faults.

A share of the calls, chosen by a seed, is answered with an error, cut, delayed or altered, or its
answer is lost after it took effect. Altered requests are refused by their signed content digest,
as real servers do and moto does not. Answers are altered only in the content of objects: S3
listings have no checksum and are protected by TLS.
"""

import hashlib
import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

# Before the server sees the call, and after it has taken effect.
BEFORE = ("error", "busy", "reset", "altered request")
AFTER = ("lost answer", "cut body", "slow body", "altered body", "error after")

_HOP = {"connection", "transfer-encoding", "keep-alive"}
_BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate</Message></Error>"
_FAILED = b"<Error><Code>InternalError</Code><Message>We failed</Message></Error>"
_REFUSED = b"<Error><Code>XAmzContentSHA256Mismatch</Code><Message>Not it</Message></Error>"


@dataclass
class Faults:
    """The faults to inject, and the counts of injected ones.

    Attributes:
        share: the share of the calls that fail.
        kinds: the possible faults.
        injected: the number of injected faults of each kind.
        calls: the number of calls.
    """

    seed: int
    share: float = 0.2
    kinds: tuple[str, ...] = (*BEFORE, *AFTER)
    injected: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    url: str = ""

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._lock = threading.Lock()

    def next(self) -> str | None:
        """The fault of the next call, or None."""
        with self._lock:
            self.calls += 1
            if self._chance.random() >= self.share:
                return None
            return self._chance.choice(self.kinds)

    def happened(self, kind: str) -> None:
        """Count an injected fault."""
        with self._lock:
            self.injected[kind] += 1


@contextmanager
def faulty_proxy(server_url: str, faults: Faults) -> Iterator[Faults]:
    """Run a proxy in front of a server within the context.

    Yields:
        The faults, whose `url` is the proxy's address.
    """
    upstream = urlsplit(server_url)

    class Handler(_Handler):
        server_address = (str(upstream.hostname), int(upstream.port or 80))
        plan = faults

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        faults.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield faults
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_address: tuple[str, int]
    plan: Faults

    def log_message(self, *_: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:  # the client closed the connection
            self.close_connection = True

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.plan.next()
        if fault in BEFORE and not self._before(fault, body):
            return
        status, headers, data = self._forward(body)
        if fault in AFTER:
            self._after(fault, status, headers, data)
        else:
            self._send(status, headers, data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer  # noqa: N815

    def _before(self, fault: str | None, body: bytes) -> bool:
        """Inject a fault before the server; True if the call continues to the server."""
        if fault == "altered request":
            if not body:
                return True
            self.plan.happened(fault)
            altered = _altered(body)
            if self.headers.get("x-amz-content-sha256") == hashlib.sha256(altered).hexdigest():
                raise AssertionError("an altered body has the same digest")
            self._send(400, {"Content-Type": "application/xml"}, _REFUSED)
            return False
        self.plan.happened(str(fault))
        if fault == "reset":
            self._reset()
        else:
            status, text = (503, _BUSY) if fault == "busy" else (500, _FAILED)
            self._send(status, {"Content-Type": "application/xml"}, text)
        return False

    def _after(self, fault: str, status: int, headers: dict[str, str], data: bytes) -> None:
        is_content = self.command == "GET" and status in (200, 206) and "ETag" in headers
        if fault in ("cut body", "slow body", "altered body") and not (data and is_content):
            self._send(status, headers, data)
            return
        self.plan.happened(fault)
        if fault == "lost answer":
            self._reset()
        elif fault == "error after":
            self._send(502, {"Content-Type": "text/html"}, b"<html>bad gateway</html>")
        elif fault == "altered body":
            self._send(status, headers, _altered(data))
        elif fault == "cut body":
            self._send(status, headers, data, until=len(data) // 2)
            self.close_connection = True
        else:
            self._send(status, headers, data, slowly=True)

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(*self.server_address, timeout=60)
        try:
            headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
            received = {k: v for k, v in answer.getheaders() if k.lower() not in _HOP}
            return answer.status, received, data
        finally:
            connection.close()

    def _send(
        self,
        status: int,
        headers: dict[str, str],
        data: bytes,
        until: int | None = None,
        slowly: bool = False,
    ) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() != "content-length":
                self.send_header(name, value)
        length = headers.get("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if slowly:
            half = len(data) // 2
            self.wfile.write(data[:half])
            time.sleep(0.05)
            data = data[half:]
        self.wfile.write(data[:until])

    def _reset(self) -> None:
        """Close the connection with a TCP reset instead of a regular end."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()  # which also holds the connection
        self.connection.close()


def _altered(data: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
