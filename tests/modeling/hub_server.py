"""A small stand-in for the hub: one data set, on loopback, as far as `datasets` asks."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Hub"

    def log_message(self, *_args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.server.seen.append(f"{self.command} {path}")
        hub = self.server
        prefix = f"/api/datasets/{hub.repo}"
        if path in (prefix, f"{prefix}/revision/main", f"{prefix}/revision/{hub.commit}"):
            return self._json(
                {
                    "_id": "0",
                    "id": hub.repo,
                    "sha": hub.commit,
                    "private": False,
                    "gated": False,
                    "disabled": False,
                    "downloads": 0,
                    "likes": 0,
                    "tags": [],
                    "siblings": [{"rfilename": name} for name in hub.files],
                }
            )
        if match := re.fullmatch(rf"{re.escape(prefix)}/tree/{hub.commit}(?:/(.*))?", path):
            return self._tree((match[1] or "").strip("/"), "recursive=true" in self.path.lower())
        if path == f"{prefix}/paths-info/{hub.commit}":
            asked = json.loads(body)["paths"] if body.startswith(b"{") else _form(body)
            return self._json([self._entry(name) for name in asked if name in hub.files])
        if match := re.fullmatch(rf"/datasets/{re.escape(hub.repo)}/resolve/([^/]+)/(.*)", path):
            if match[1] in (hub.commit, "main") and match[2] in hub.files:
                return self._file(hub.files[match[2]])
            return self._missing("EntryNotFound")
        return self._missing("RepoNotFound")

    def _tree(self, folder: str, recursive: bool) -> None:
        start = f"{folder}/" if folder else ""
        below = [name for name in self.server.files if name.startswith(start)]
        if folder and not below:
            return self._missing("EntryNotFound")
        direct = [name for name in below if recursive or "/" not in name[len(start) :]]
        folders = {
            start + name[len(start) :].split("/")[0] for name in below if "/" in name[len(start) :]
        }
        entries = [{"type": "directory", "path": f, "oid": "0", "size": 0} for f in sorted(folders)]
        return self._json([*entries, *(self._entry(name) for name in direct)])

    def _entry(self, name: str) -> dict[str, object]:
        data = self.server.files[name]
        return {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}

    def _file(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("etag", f'"{_etag(data)}"')
        self.send_header("x-repo-commit", self.server.commit)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, code: str) -> None:
        self.send_response(404)
        self.send_header("x-error-code", code)
        self.send_header("content-length", "0")
        self.end_headers()


class Hub(ThreadingHTTPServer):
    repo: str
    commit: str
    files: dict[str, bytes]
    seen: list[str]


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _form(body: bytes) -> list[str]:
    return [unquote(part[6:].decode()) for part in body.split(b"&") if part.startswith(b"paths=")]


@contextmanager
def hub(repo: str, files: Mapping[str, bytes]) -> Iterator[Hub]:
    """Serve one data set; its commit is `server.commit`, what was asked `server.seen`."""
    server = Hub(("127.0.0.1", 0), _Handler)
    server.repo, server.files, server.seen = repo, dict(files), []
    server.commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
