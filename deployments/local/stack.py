"""The whole set-up of a team on one machine: `restitch up` and `restitch down`.

    Prefect server   MLflow server   webhook receiver   workers
          └── pools, deployments, automations, schedules: `server.deploy`

Both servers keep their state in SQLite in the home, or in PostgreSQL (`local.databases`), and
listen on loopback. Every process has a log in `RESTITCH_HOME/logs` and an entry in `stack.json`.
`up` starts only what is not running, so it also repairs a stack after a crash; `down` stops the
processes of `up` with their children. Both may be killed and run again.
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
from restitch.deployments.server.deploy import deploy, make_pool
from restitch.deployments.server.schedules import plans
from restitch.merging.errors import BadInput, Unavailable
from restitch.registry.home import Home, prepare_environment
from restitch.registry.stack import SECRETS, StackFile
from restitch.tasks.runtime.console import warn
from restitch.tasks.runtime.crash_recovery import STUCK_AFTER
from restitch.tasks.runtime.events import start_run


@dataclass(frozen=True)
class Up:
    """A running stack.

    Attributes:
        started: the processes that this call started.
        changes: its changes on the Prefect server.
        paused: the parts that are paused, by a decision or in Prefect.
    """

    prefect_url: str
    mlflow_url: str
    webhook_url: str
    workers: int
    logs: str
    started: tuple[str, ...]
    changes: tuple[str, ...]
    paused: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def up(home: Home, workers: int | None = None, pool: str = "gpu", say: Say = print) -> Up:
    """Start the processes that are not running, and wait until all answer.

    Args:
        home: of the stack.
        workers: their number; by default as many as before, at first one.
        pool: the workers' pool.
        say: receives a line about each wait.

    Raises:
        BadInput: the environment names other servers.
        Unavailable: a process does not start, or a database refuses.
    """
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        if os.environ.get(name):
            raise BadInput(
                f"{name} is set, but `restitch up` starts a server of its own",
                hint="unset it; or use your servers with `restitch deploy` and workers",
            )
    home.create()
    with _locked(home), _environment_restored():
        stack = StackFile.read(home.root)
        for process in stack.processes.values():
            if not is_running(process):
                stop_process(process)  # children that survived it hold its port
        known = sum(name.startswith("worker-") for name in stack.processes)
        count = workers if workers is not None else max(known, 1)
        ports = ports_of(stack)
        addresses = Addresses(ports)
        runner = Runner(home, stack.model_copy(update={"ports": ports}))
        used = databases(home, os.environ)
        servers = [_prefect(home, addresses, used.prefect), _mlflow(home, addresses, used.mlflow)]
        runner.ensure(servers, say)
        runner.publish(
            prefect_api_url=addresses.prefect_api,
            mlflow_uri=addresses.mlflow,
            webhook_url=addresses.webhook,
        )
        prepare_environment(home)
        make_pool(pool)
        runner.ensure([_webhook(home, addresses)], say)
        _connect_webhook(addresses, home)
        staff = [_worker(number, pool, addresses, count) for number in range(1, count + 1)]
        runner.ensure(staff, say)
        runner.stop_others({plan.name for plan in staff})
        if runner.started:
            runner.wait_for_workers(staff, pool, say)
        # Last, so that nothing that is wrong with a line keeps the processes from running.
        deployed = deploy(pool)
        if runner.started:
            _reconcile()
    return Up(
        prefect_url=addresses.prefect,
        mlflow_url=addresses.mlflow,
        webhook_url=addresses.webhook,
        workers=count,
        logs=str(home.root / "logs"),
        started=tuple(runner.started),
        changes=deployed.changes,
        paused=deployed.off,
    )


def down(home: Home) -> tuple[str, ...]:
    """Stop the processes of `up`, workers first.

    Returns:
        The names of those that were running.
    """
    if not home.root.exists():
        return ()
    with _locked(home):
        stack = StackFile.read(home.root)
        order = sorted(stack.processes, key=lambda name: (not name.startswith("worker"), name))
        stopped = [name for name in order if stop_process(stack.processes[name])]
        StackFile(ports=stack.ports).write(home.root)
    return tuple(stopped)


@dataclass(frozen=True)
class Addresses:
    """The addresses of a stack's servers."""

    ports: Mapping[str, int]

    @property
    def prefect(self) -> str:
        """Prefect's pages."""
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
        """The address that takes webhooks."""
        return f"http://{LOOPBACK}:{self.ports['webhook']}/webhook"


def _prefect(home: Home, at: Addresses, database: str | None) -> Plan:
    port = at.ports["prefect"]
    connection = {} if database is None else {PREFECT_VARIABLES[0]: database}
    return Plan(
        name="prefect",
        command=module(
            *("restitch.deployments.server.prefect_server", "server", "start"),
            *("--host", LOOPBACK, "--port", str(port)),
        ),
        environment={
            **SERVER_ENVIRONMENT,
            **connection,
            "PREFECT_HOME": str(home.root / "prefect"),
            # Otherwise its pages use the standard port.
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
            # Clients on this machine write artifacts themselves, with or without the server.
            *("--default-artifact-root", home.mlartifacts.as_uri(), "--no-serve-artifacts"),
        ),
        environment={
            # Not in the command, which every user of the host can read: it may have a password.
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
    # Workers that each use every core slow each other down.
    threads = str(max(1, (os.cpu_count() or 1) // count))
    return Plan(
        name=name,
        command=module(
            *("prefect", "worker", "start", "--pool", pool, "--type", "process"),
            # One model at a time: a device may not have memory for two.
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
    """A secret of this home, made once; only its owner can read it."""
    folder = home.root / SECRETS
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / name
    if not path.exists():
        # Complete before it gets its name; in the form of a Fernet key.
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
        # For instance: the webhooks in the database have another encryption key.
        warn(f"MLflow fires no webhook, the schedule finds new versions: {error.message()}")


def _reconcile() -> None:
    """Start a remerge of every line that is not paused, to catch up after the stack was down.

    A second one later finds the runs that a worker took before it died and that never start.
    """
    now = datetime.now(UTC)
    for line in (line for line, plan in plans().items() if plan.is_worked_on):
        for at in (None, now + STUCK_AFTER + timedelta(seconds=15)):
            start_run("remerge", {"line": line}, f"up-{line}-{now.isoformat()}-{at}", at)


@contextmanager
def _environment_restored() -> Iterator[None]:
    """Remove the variable that clients set: the stack file names the server."""
    try:
        yield
    finally:
        os.environ.pop("PREFECT_API_URL", None)


@contextmanager
def _locked(home: Home) -> Iterator[None]:
    folder = home.root / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "stack").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
