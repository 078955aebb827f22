"""A fast server with as much of S3 as the transfer of one file needs.

It checks no signature and no checksum, only the conditions of a write. Parts stay separate files,
and `sendfile` copies them to the socket.
"""

import multiprocessing
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

_BLOCK = 1 << 20
_META = "x-amz-meta-"
_XML = "<?xml version='1.0' encoding='UTF-8'?>"


@contextmanager
def s3_stand_in(folder: Path) -> Iterator[str]:
    """Run the server in a separate process; yields the value for `AWS_ENDPOINT_URL`."""
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("spawn")
    answer, send = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(send, folder), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{answer.recv()}"
    finally:
        process.kill()
        process.join()
        shutil.rmtree(folder)


def _serve(send: Any, folder: Path) -> None:
    class Handler(_Handler):
        root = folder
        objects: dict[str, dict[str, Any]] = {}  # noqa: RUF012  one for all connections
        uploads: dict[str, dict[str, Any]] = {}  # noqa: RUF012
        lock = threading.Lock()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        send.send(server.server_address[1])
        server.serve_forever()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path
    objects: dict[str, dict[str, Any]]
    uploads: dict[str, dict[str, Any]]
    lock: threading.Lock

    def log_message(self, *_: Any) -> None:
        pass

    def do_PUT(self) -> None:
        path, asked = self._asked()
        file, size = self._receive()
        if "uploadId" in asked:
            upload = self.uploads[asked["uploadId"][0]]
            upload["parts"][int(asked["partNumber"][0])] = (str(file), size)
        else:
            found = {"metadata": self._metadata(), "parts": [(str(file), size)], "size": size}
            if not self._publish(path, found):
                return self._answer(412, "<Error><Code>PreconditionFailed</Code></Error>")
        return self._answer(200, etag=file.name)

    def do_POST(self) -> None:
        path, asked = self._asked()
        file, _ = self._receive()
        file.unlink()
        if "uploads" in asked:
            upload = uuid4().hex
            self.uploads[upload] = {"metadata": self._metadata(), "parts": {}}
            text = f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId>"
            return self._answer(200, text + "</InitiateMultipartUploadResult>")
        upload_found = self.uploads.pop(asked["uploadId"][0])
        parts = [part for _, part in sorted(upload_found["parts"].items())]
        size = sum(length for _, length in parts)
        found = {"metadata": upload_found["metadata"], "parts": parts, "size": size}
        self._publish(path, found)
        text = "<CompleteMultipartUploadResult><ETag>whole</ETag></CompleteMultipartUploadResult>"
        return self._answer(200, text)

    def do_HEAD(self) -> None:
        path, _ = self._asked()
        if path.count("/") == 1:  # the bucket
            return self._answer(200)
        found = self.objects.get(path)
        if found is None:
            return self._answer(404)
        return self._begin(200, found, found["size"], {})

    def do_GET(self) -> None:
        path, _ = self._asked()
        found = self.objects.get(path)
        if found is None:
            return self._answer(404, "<Error><Code>NoSuchKey</Code></Error>")
        start, end = 0, found["size"]
        if "Range" in self.headers:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            start, end = int(first), min(end, int(last or end) + 1)
            span = {"Content-Range": f"bytes {start}-{end - 1}/{found['size']}"}
            self._begin(206, found, end - start, span)
        else:
            self._begin(200, found, end, {})
        return self._send(found, start, end)

    def do_DELETE(self) -> None:
        self.objects.pop(self._asked()[0], None)
        self._answer(204)

    def _asked(self) -> tuple[str, dict[str, list[str]]]:
        parts = urlsplit(self.path)
        return parts.path, parse_qs(parts.query, keep_blank_values=True)

    def _metadata(self) -> dict[str, str]:
        return {k: v for k, v in self.headers.items() if k.lower().startswith(_META)}

    def _publish(self, path: str, found: dict[str, Any]) -> bool:
        found["etag"] = Path(found["parts"][0][0]).name if found["parts"] else "none"
        with self.lock:
            current = self.objects.get(path)
            expected = self.headers.get("If-Match", "").strip('"')
            if (current and "If-None-Match" in self.headers) or (
                expected and (current is None or current["etag"] != expected)
            ):
                return False
            self.objects[path] = found
        return True

    def _receive(self) -> tuple[Path, int]:
        file, left = self.root / uuid4().hex, int(self.headers.get("Content-Length", 0))
        size, buffer = left, memoryview(bytearray(_BLOCK))
        with file.open("wb", buffering=0) as out:
            while left:
                count = self.rfile.readinto(buffer[: min(left, _BLOCK)])
                out.write(buffer[:count])
                left -= count
        return file, size

    def _begin(self, status: int, found: dict[str, Any], size: int, more: dict[str, str]) -> None:
        self.send_response_only(status)
        headers = {**found["metadata"], **more, "ETag": f'"{found["etag"]}"'}
        headers |= {"Content-Length": str(size), "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, found: dict[str, Any], start: int, end: int) -> None:
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        at = 0
        for file, size in found["parts"]:
            first, last = max(start - at, 0), min(end - at, size)
            at += size
            if first >= last:
                continue
            source = os.open(file, os.O_RDONLY)
            try:
                while first < last:
                    first += os.sendfile(self.connection.fileno(), source, first, last - first)
            except OSError:  # the client closed the connection
                self.close_connection = True
                return
            finally:
                os.close(source)

    def _answer(self, status: int, text: str = "", etag: str | None = None) -> None:
        body = (_XML + text).encode() if text else b""
        self.send_response_only(status)
        if etag:
            self.send_header("ETag", f'"{etag}"')
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
