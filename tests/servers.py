"""Servers for tests on loopback, each in its own process and with its own state."""

import base64
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STARTS_WITHIN = 120.0

QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
    "PREFECT_CLI_PROMPT": "false",
    "PREFECT_LOGGING_SERVER_LEVEL": "WARNING",
    "DO_NOT_TRACK": "1",
}


MLFLOW = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    # Webhooks go to loopback, and a new one works at once.
    "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
    "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
    "MLFLOW_WEBHOOK_CACHE_TTL": "1",
    "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": base64.urlsafe_b64encode(bytes(32)).decode(),
}


def free_port() -> int:
    """A free port on loopback."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def prefect_server(home: Path, module: str = "prefect") -> Iterator[str]:
    """Run a Prefect server for the length of the context.

    Args:
        home: its `PREFECT_HOME`.
        module: the module with the command; Prefect's own by default.

    Yields:
        The value for `PREFECT_API_URL`.
    """
    port = free_port()
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    home.mkdir(parents=True, exist_ok=True)
    log = home / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", module, "server", "start"),
                *("--host", "127.0.0.1", "--port", str(port), "--no-ui"),
            ],
            env={**kept, **QUIET, "PREFECT_HOME": str(home), "HOME": str(home)},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=home,
        )
    try:
        url = f"http://127.0.0.1:{port}/api"
        _wait(f"{url}/health", process, log)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# So short that a listing of some length has several pages.
PAGE = 100
_MOTO_SETTINGS = {
    "MOTO_S3_DEFAULT_KEY_BUFFER_SIZE": str(1 << 28),
    "MOTO_S3_DEFAULT_MAX_KEYS": str(PAGE),
}
_MOTO = """
import sys, threading
from moto import server
one, answer = threading.Lock(), server.DomainDispatcherApplication.__call__
def in_turn(self, environ, start):
    # moto looks and then writes; conditional writes need both in one step.
    with one:
        return answer(self, environ, start)
server.DomainDispatcherApplication.__call__ = in_turn
server.main(sys.argv[1:])
"""


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Run an S3 server for the length of the context, in memory.

    Args:
        folder: for its log.

    Yields:
        The value for `AWS_ENDPOINT_URL`.
    """
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", _MOTO, "-H", "127.0.0.1", "-p", str(port)],
            env={**os.environ, **_MOTO_SETTINGS},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=folder,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(f"{url}/moto-api/data.json", process, log)
        yield url
    finally:
        process.kill()
        process.wait()


@contextmanager
def mlflow_server(home: Path, **environment: str) -> Iterator[str]:
    """Run an MLflow server for the length of the context; its state stays in the folder.

    Args:
        home: for its database, its artifacts and its log.
        environment: further variables.

    Yields:
        The value for `MLFLOW_TRACKING_URI`.
    """
    port = free_port()
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    home.mkdir(parents=True, exist_ok=True)
    log = home / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
                *("--host", "127.0.0.1", "--port", str(port)),
                *("--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}"),
                *("--artifacts-destination", str(home / "artifacts")),
            ],
            env={**kept, **MLFLOW, "HOME": str(home), **environment},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=home,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(f"{url}/health", process, log)
        yield url
    finally:
        # Its workers are separate processes and would outlive it.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def postgres_programs() -> list[Path]:
    """The program folders of the installed releases of PostgreSQL, newest last, as on Debian."""
    programs = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    return [path.parent for path in sorted(programs, key=lambda path: int(path.parts[4]))]


@contextmanager
def postgres_server(password: str) -> Iterator[str]:
    """Run an empty PostgreSQL for the length of the context.

    Args:
        password: of its superuser `postgres`.

    Yields:
        Its host and port.
    """
    programs, port = postgres_programs()[-1], free_port()
    # It refuses to run as root, and its account `postgres` cannot enter root's folders.
    as_root = os.geteuid() == 0
    account: dict[str, Any] = {}
    if as_root:
        account = {"user": "postgres", "group": "postgres", "extra_groups": []}
    with tempfile.TemporaryDirectory(prefix="restitch-postgres-", dir="/tmp") as name:
        folder, log = Path(name), Path(name) / "server.log"
        (folder / "password").write_text(password)
        log.touch()
        if as_root:
            for path in (folder, folder / "password", log):
                shutil.chown(path, "postgres", "postgres")
        subprocess.run(
            [
                *(programs / "initdb", "--pgdata", folder / "data", "--no-sync"),
                *("--username", "postgres", "--pwfile", folder / "password"),
                *("--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C.UTF-8"),
            ],
            check=True,
            capture_output=True,
            cwd=folder,
            **account,
        )
        with log.open("ab") as out:
            process = subprocess.Popen(
                [
                    *(programs / "postgres", "-D", folder / "data", "-p", str(port)),
                    *("-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="),
                    *("-c", "fsync=off"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=folder,
                **account,
            )
        try:
            ready = [str(programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
            deadline = time.monotonic() + STARTS_WITHIN
            while subprocess.run(ready).returncode != 0:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"PostgreSQL did not start:\n{log.read_text()[-4000:]}")
                time.sleep(0.1)
            yield f"127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGQUIT)  # stops at once, with its children
            process.wait()


def _wait(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                if answer.status == 200:
                    return
        except (OSError, urllib.error.URLError):
            pass
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-4000:]}")
