"""The whole team's set-up on one machine: `restitch up` and `restitch down`.

    Prefect server   MLflow server   webhook receiver   workers
          └── pools, deployments, automations, schedules: restitch.deployments.server.deploy

Both servers keep their state in SQLite in the home, or in PostgreSQL (`restitch.deployments.local.databases`).

Every process has a session of its own, a log under `RESTITCH_HOME/logs` and its place in
`stack.json`. `up` starts what is not running and leaves alone what is, so it also mends a
stack of which something died; `down` stops what `up` started, with all that those processes
started, and nothing else. Both may be killed and run again. Servers listen on loopback.
"""

import base64
import fcntl
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from restitch.deployments.local.databases import MLFLOW_VARIABLE, PREFECT_VARIABLES, databases
from restitch.deployments.local.health import is_running
from restitch.deployments.local.processes import (
    LOOPBACK,
    Plan,
    Runner,
    Say,
    module,
    ports_of,
    stop_process,
)
from restitch.deployments.server.definitions import SERVER_ENVIRONMENT, WORKER_ENVIRONMENT
from restitch.deployments.server.deploy import cron_lines, deploy
from restitch.merging.errors import BadInput, Unavailable
from restitch.registry.home import Home, prepare_environment
from restitch.registry.stack import SECRETS, StackFile
from restitch.tasks.runtime.console import warn
from restitch.tasks.runtime.crash_recovery import STUCK_AFTER
from restitch.tasks.runtime.events import start_run


@dataclass(frozen=True)
class Up:
    """What runs.

    Attributes:
        started: the processes that this call started; empty where all was there.
        changes: what it changed on the Prefect server.
    """

    prefect_url: str
    mlflow_url: str
    webhook_url: str
    workers: int
    logs: str
    started: tuple[str, ...]
    changes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def up(home: Home, workers: int | None = None, pool: str = "gpu", say: Say = print) -> Up:
    """Start what is not running, and wait until all answer.

    Args:
        home: whose stack it is.
        workers: how many workers; by default as many as before, at first one.
        pool: the work pool that they serve.
        say: told what is waited for.

    Raises:
        BadInput: the environment names servers that the stack would not be.
        Unavailable: something does not start, and its log is named; or a database refuses.
    """
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        if os.environ.get(name):
            raise BadInput(
                f"{name} is set, and `restitch up` would start a server of its own",
                found=name,
                hint="unset it; or use your servers with `restitch deploy` and workers",
            )
    home.create()
    with _alone(home), _same_environment():
        stack = StackFile.read(home.root)
        for process in stack.processes.values():
            if not is_running(process):
                stop_process(process)  # what it left behind when it died holds its port
        known = sum(name.startswith("worker-") for name in stack.processes)
        count = workers if workers is not None else max(known, 1)
        ports = ports_of(stack)
        addresses = Addresses(ports)
        runner = Runner(home, stack.model_copy(update={"ports": ports}))
        used = databases(home, os.environ)
        servers = [_prefect(home, addresses, used.prefect), _mlflow(home, addresses, used.mlflow)]
        runner.bring(servers, say)
        runner.publish(
            prefect_api_url=addresses.prefect_api,
            mlflow_uri=addresses.mlflow,
            webhook_url=addresses.webhook,
        )
        prepare_environment(home)
        changes = deploy(pool).changes
        runner.bring([_webhook(home, addresses)], say)
        _connect_webhook(addresses, home)
        plans = [_worker(number, pool, addresses, count) for number in range(1, count + 1)]
        runner.bring(plans, say)
        runner.stop_others({plan.name for plan in plans})
        if runner.started:
            runner.wait_for_workers(plans, pool, say)
            _reconcile()
    return Up(
        prefect_url=addresses.prefect,
        mlflow_url=addresses.mlflow,
        webhook_url=addresses.webhook,
        workers=count,
        logs=str(home.root / "logs"),
        started=tuple(runner.started),
        changes=changes,
    )


def down(home: Home) -> tuple[str, ...]:
    """Stop what `up` started, workers first.

    Returns:
        The names of the processes that were running.
    """
    if not home.root.exists():
        return ()
    with _alone(home):
        stack = StackFile.read(home.root)
        order = sorted(stack.processes, key=lambda name: (not name.startswith("worker"), name))
        stopped = [name for name in order if stop_process(stack.processes[name])]
        StackFile(ports=stack.ports).write(home.root)
    return tuple(stopped)


@dataclass(frozen=True)
class Addresses:
    """Where the servers of a stack listen."""

    ports: Mapping[str, int]

    @property
    def prefect(self) -> str:
        """Prefect's pages; its API is below."""
        return f"http://{LOOPBACK}:{self.ports['prefect']}"

    @property
    def prefect_api(self) -> str:
        """Prefect's API."""
        return f"{self.prefect}/api"

    @property
    def mlflow(self) -> str:
        """MLflow's pages and API."""
        return f"http://{LOOPBACK}:{self.ports['mlflow']}"

    @property
    def webhook(self) -> str:
        """Where the receiver takes webhooks."""
        return f"http://{LOOPBACK}:{self.ports['webhook']}/webhook"


def _prefect(home: Home, at: Addresses, database: str | None) -> Plan:
    port = at.ports["prefect"]
    kept = {} if database is None else {PREFECT_VARIABLES[0]: database}
    return Plan(
        name="prefect",
        command=module(
            *("restitch.deployments.server.prefect_server", "server", "start"),
            *("--host", LOOPBACK, "--port", str(port)),
        ),
        environment={
            **SERVER_ENVIRONMENT,
            **kept,
            "PREFECT_HOME": str(home.root / "prefect"),
            # Its pages ask at the standard port otherwise.
            "PREFECT_SERVER_UI_API_URL": at.prefect_api,
        },
        port=port,
        ready=f"{at.prefect_api}/health",
    )


def _mlflow(home: Home, at: Addresses, database: str | None) -> Plan:
    port = at.ports["mlflow"]
    return Plan(
        name="mlflow",
        command=module(
            *("mlflow", "server", "--host", LOOPBACK, "--port", str(port), "--workers", "1"),
            # Clients of this machine write artifacts themselves, with the server and without.
            *("--default-artifact-root", home.mlartifacts.as_uri(), "--no-serve-artifacts"),
        ),
        environment={
            # Not in the command, where every user of the host could read a password.
            MLFLOW_VARIABLE: database or f"sqlite:///{home.root / 'mlflow.db'}",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
            "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
            "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": _secret(home, "webhook-encryption-key"),
        },
        port=port,
        ready=f"{at.mlflow}/health",
    )


def _webhook(home: Home, at: Addresses) -> Plan:
    port = at.ports["webhook"]
    return Plan(
        name="webhook",
        command=module("restitch.cli.main", "webhook", "--port", str(port)),
        environment={
            "RESTITCH_WEBHOOK_SECRET": _secret(home, "webhook-secret"),
            "PREFECT_API_URL": at.prefect_api,
        },
        port=port,
        ready=f"http://{LOOPBACK}:{port}/health",
    )


def _worker(number: int, pool: str, at: Addresses, count: int) -> Plan:
    name = f"worker-{number}"
    # Workers that all compute with every core stand in each other's way.
    threads = str(max(1, (os.cpu_count() or 1) // count))
    return Plan(
        name=name,
        command=module(
            *("prefect", "worker", "start", "--pool", pool, "--type", "process"),
            # One model at a time: a device has no room for two.
            *("--name", f"{socket.gethostname()}-{name}", "--limit", "1"),
        ),
        environment={
            **WORKER_ENVIRONMENT,
            "PREFECT_API_URL": at.prefect_api,
            "RESTITCH_WORK_POOL": pool,
            "RESTITCH_WORKER": f"{socket.gethostname()}-{name}",
        },
        threads=threads,
    )


def _secret(home: Home, name: str) -> str:
    """A secret of this home, made once and readable by its owner only."""
    folder = home.root / SECRETS
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / name
    if not path.exists():
        # Written whole before it has its name; the form is that of a Fernet key.
        temporary = folder / f".{name}-{os.getpid()}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(base64.urlsafe_b64encode(secrets.token_bytes(32)))
        temporary.replace(path)
    return path.read_text()


def _connect_webhook(at: Addresses, home: Home) -> None:
    from restitch.deployments.webhook import register_webhook

    try:
        register_webhook(at.mlflow, at.webhook, _secret(home, "webhook-secret"))
    except Unavailable as error:
        # For instance another encryption key than that of the webhooks in the database.
        warn(f"MLflow fires no webhook, the schedule finds new versions: {error.message()}")


def _reconcile() -> None:
    """Start a remerge of every line: whatever happened while the stack was down is found now.

    And one more a little later: a run that a dead worker had taken shows only by not beginning.
    """
    now = datetime.now(UTC)
    for line in cron_lines():
        for at in (None, now + STUCK_AFTER + timedelta(seconds=15)):
            start_run("remerge", {"line": line}, f"up-{line}-{now.isoformat()}-{at}", at)


@contextmanager
def _same_environment() -> Iterator[None]:
    """Leave the environment as it was: the stack file names the server, not a variable."""
    try:
        yield
    finally:
        os.environ.pop("PREFECT_API_URL", None)


@contextmanager
def _alone(home: Home) -> Iterator[None]:
    folder = home.root / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "stack").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
