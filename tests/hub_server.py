"""A small hub on loopback: the few calls that `huggingface_hub` and `datasets` make.

A `FakeHub` holds repositories with commits and branches in memory and serves them over
HTTP, and takes uploads. Clients are pointed to it by `HF_ENDPOINT`, which they read at import, so
tests run them in a process of their own (`run_python`) with an empty cache. `requests` logs what
was asked, `broken` makes every answer a 503 and `stop` takes the hub away.
"""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

ROOT = Path(__file__).parent.parent


class FakeHub:
    """Repositories by kind ("models" or "datasets") and id, served while it runs."""

    def __init__(self) -> None:
        self.commits: dict[tuple[str, str], dict[str, dict[str, bytes]]] = {}
        self.branches: dict[tuple[str, str], dict[str, str]] = {}
        self.requests: list[str] = []
        self.broken = False
        self.removed: set[str] = set()
        self.private: set[str] = set()
        self.forbidden: set[str] = set()  # owners whose repositories nobody may write to
        self.large: dict[str, bytes] = {}  # what was uploaded of large files, by SHA-256
        self.most_large: int | None = None  # refuse uploads when it holds so many
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        """The value for `HF_ENDPOINT`."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def commit(
        self, repo: str, files: Mapping[str, bytes], *, kind: str = "models", branch: str = "main"
    ) -> str:
        """Add a commit with exactly these files and move the branch to it."""
        content = [(name, hashlib.sha1(data).hexdigest()) for name, data in sorted(files.items())]
        number = len(self.commits.get((kind, repo), {}))
        sha = hashlib.sha1(json.dumps([repo, kind, number, content]).encode()).hexdigest()
        self.commits.setdefault((kind, repo), {})[sha] = dict(files)
        self.branches.setdefault((kind, repo), {})[branch] = sha
        return sha

    def stop(self) -> None:
        """Refuse all further connections."""
        self._server.shutdown()
        self._server.server_close()

    def environment(self, cache: Path) -> dict[str, str]:
        """The variables under which a client uses this hub, and this cache."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_DATASETS_CACHE": str(cache / "datasets"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_ETAG_TIMEOUT": "5",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(ROOT),
        }

    def run_python(
        self, code: str, cache: Path, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run Python code in a process that uses this hub."""
        return subprocess.run(
            [sys.executable, "-c", code],
            env=self.environment(cache) | variables,
            cwd=cache,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def find(self, kind: str, repo: str, revision: str) -> str | None:
        """The commit that a branch or a commit names."""
        if revision in self.commits.get((kind, repo), {}):
            return revision
        return self.branches.get((kind, repo), {}).get(revision)

    def _handler(hub) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer()

            def do_HEAD(self) -> None:
                self._answer()

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                self._answer(self.rfile.read(length))

            def do_PUT(self) -> None:
                self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

            def log_message(self, *_: object) -> None:
                pass

            def _answer(self, body: bytes = b"") -> None:
                url = urlsplit(self.path)
                path = unquote(url.path)
                hub.requests.append(f"{self.command} {path}")
                if hub.broken:
                    self._send(503, b"", {})
                    return
                parts = path.strip("/").split("/")
                if parts[:2] == ["api", "repos"]:
                    self._create(json.loads(body))
                elif path == "/api/validate-yaml":
                    self._json({"errors": [], "warnings": []})
                elif path.endswith(".git/info/lfs/objects/batch"):
                    self._batch(json.loads(body))
                elif parts[0] == "large":
                    self._put(parts[1], body)
                elif parts[0] == "api" and parts[4:5] in (["preupload"], ["commit"]):
                    self._upload("/".join(parts[2:4]), parts[4], body)
                elif parts[0] == "api" and len(parts) >= 4 and parts[1] in ("models", "datasets"):
                    self._api(parts[1], "/".join(parts[2:4]), parts[4:], body)
                elif "resolve" in parts:
                    at = parts.index("resolve")
                    kind = "datasets" if parts[0] == "datasets" else "models"
                    repo = "/".join(parts[at - 2 : at])
                    # A branch name may hold slashes, but not in these tests.
                    self._file(kind, repo, parts[at + 1], "/".join(parts[at + 2 :]))
                else:
                    self._send(404, b"", {})

            def _create(self, asked: dict[str, Any]) -> None:
                repo = f"{asked['organization']}/{asked['name']}"
                if asked["organization"] in hub.forbidden:
                    self._send(403, b"{}", {"X-Error-Message": "you may not write here"})
                elif ("models", repo) in hub.commits:
                    self._send(409, json.dumps({"url": f"{hub.url}/{repo}"}).encode(), {})
                else:
                    hub.commits["models", repo], hub.branches["models", repo] = {}, {}
                    hub.commit(repo, {".gitattributes": b""})
                    if asked.get("private") or asked.get("visibility") == "private":
                        hub.private.add(repo)
                    self._json({"url": f"{hub.url}/{repo}"})

            def _upload(self, repo: str, what: str, body: bytes) -> None:
                if what == "preupload":
                    modes = [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith("tensors") else "regular",
                            "shouldIgnore": False,
                        }
                        for file in json.loads(body)["files"]
                    ]
                    self._json({"files": modes})
                    return
                files = dict(hub.commits["models", repo][hub.branches["models", repo]["main"]])
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        files[value["path"]] = hub.large[value["oid"]]
                    elif line["key"] == "deletedFile":
                        del files[value["path"]]
                sha = hub.commit(repo, files)
                url = f"{hub.url}/{repo}/commit/{sha}"
                self._json({"commitUrl": url, "commitOid": sha, "success": True})

            def _batch(self, asked: dict[str, Any]) -> None:
                objects = []
                for one in asked["objects"]:
                    actions = {"upload": {"href": f"{hub.url}/large/{one['oid']}"}}
                    present = one["oid"] in hub.large
                    objects.append({**one} if present else {**one, "actions": actions})
                self._json({"transfer": "basic", "objects": objects})

            def _put(self, oid: str, body: bytes) -> None:
                if hub.most_large is not None and len(hub.large) >= hub.most_large:
                    self._send(403, b"", {})
                    return
                assert hashlib.sha256(body).hexdigest() == oid
                hub.large[oid] = body
                self._send(200, b"", {})

            def _api(self, kind: str, repo: str, rest: list[str], body: bytes) -> None:
                if (kind, repo) not in hub.commits:
                    self._missing("RepoNotFound")
                    return
                what = rest[0] if rest else "revision"
                revision = rest[1] if len(rest) > 1 else "main"
                sha = hub.find(kind, repo, revision)
                if sha is None:
                    self._missing("RevisionNotFound")
                    return
                files = hub.commits[kind, repo][sha]
                if what == "revision":
                    self._json(
                        {
                            "id": repo,
                            "sha": sha,
                            "private": repo in hub.private,
                            "gated": False,
                            "disabled": False,
                            "tags": [],
                            "downloads": 0,
                            "likes": 0,
                            "siblings": [
                                {"rfilename": name, "size": len(files[name])}
                                for name in sorted(files)
                            ],
                        }
                    )
                elif what == "tree":
                    folder = "/".join(rest[2:])
                    query = parse_qs(urlsplit(self.path).query)
                    deep = query.get("recursive", [""])[0].lower() in ("true", "1")
                    self._json(_tree(files, folder, deep=deep))
                elif what == "paths-info":
                    wanted = _form(body).get("paths", [])
                    entries = _tree(files, "", deep=True)
                    self._json([entry for entry in entries if entry["path"] in wanted])
                else:
                    self._send(404, b"", {})

            def _file(self, kind: str, repo: str, revision: str, name: str) -> None:
                sha = hub.find(kind, repo, revision)
                if (kind, repo) not in hub.commits:
                    self._missing("RepoNotFound")
                elif sha is None:
                    self._missing("RevisionNotFound")
                elif name not in hub.commits[kind, repo][sha] or name in hub.removed:
                    self._missing("EntryNotFound", {"X-Repo-Commit": sha})
                else:
                    data = hub.commits[kind, repo][sha][name]
                    headers = {
                        "X-Repo-Commit": sha,
                        "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
                        "Accept-Ranges": "bytes",
                    }
                    asked = self.headers.get("Range")
                    if asked and self.command == "GET":
                        first, _, last = asked.removeprefix("bytes=").partition("-")
                        start, end = int(first), min(int(last or len(data)), len(data) - 1)
                        headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
                        self._send(206, data[start : end + 1], headers)
                    else:
                        self._send(200, data, headers)

            def _missing(self, code: str, headers: Mapping[str, str] | None = None) -> None:
                self._send(404, b"", {"X-Error-Code": code, **(headers or {})})

            def _json(self, value: object) -> None:
                self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

            def _send(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

        return Handler


def _form(body: bytes) -> dict[str, list[str]]:
    try:
        values = json.loads(body)
    except ValueError:
        return parse_qs(body.decode())
    paths = values.get("paths", [])
    return {"paths": [paths] if isinstance(paths, str) else paths}


def _tree(files: Mapping[str, bytes], folder: str, *, deep: bool) -> list[dict[str, object]]:
    prefix = f"{folder}/" if folder else ""
    entries: list[dict[str, object]] = []
    folders: set[str] = set()
    for name, data in sorted(files.items()):
        if not name.startswith(prefix):
            continue
        above = name[len(prefix) :].split("/")[:-1]
        for depth in range(1, len(above) + 1 if deep else min(len(above), 1) + 1):
            folders.add(prefix + "/".join(above[:depth]))
        if deep or not above:
            oid = hashlib.sha1(data).hexdigest()
            entries.append({"type": "file", "path": name, "size": len(data), "oid": oid})
    for path in sorted(folders):
        oid = hashlib.sha1(path.encode()).hexdigest()
        entries.append({"type": "directory", "path": path, "size": 0, "oid": oid})
    return entries


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub for the length of the context."""
    hub = FakeHub()
    try:
        yield hub
    finally:
        hub.stop()
