"""The whole team's set-up on one machine: `restitch up` and `restitch down`.

    Prefect server (SQLite)   MLflow server (SQLite)   webhook receiver   workers
          └── pools, deployments, automations, schedules: deployments.deploy

Every process has a session of its own, a log under `RESTITCH_HOME/logs` and its place in
`stack.json`. `up` starts what is not running and leaves alone what is, so it also mends a
stack of which something died; `down` stops what `up` started, with all that those processes
started, and nothing else. Both may be killed and run again. Servers listen on loopback.
"""

import base64
import fcntl
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deployments.definitions import SERVER_ENVIRONMENT, WORKER_ENVIRONMENT
from merging.digests import digest_json
from merging.errors import BadInput, Unavailable
from registry.attempts import process_began
from registry.home import Home, prepare_environment
from registry.stack import StackFile, StackProcess

LOOPBACK = "127.0.0.1"
STARTS_WITHIN = 180.0
STOPS_WITHIN = 15.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """A process as it should be.

    Attributes:
        ready: the address that answers once it is there.
    """

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    port: int | None = None
    ready: str | None = None

    @property
    def digest(self) -> str:
        """What it serves: another digest, another process."""
        # Whatever name this Python has: `up` is called by path, by link and by `make`.
        return digest_json([list(self.command[1:]), self.environment])


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
        Unavailable: something does not start; its log is named.
    """
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        if os.environ.get(name):
            raise BadInput(
                f"{name} is set, and `restitch up` would start a server of its own",
                found=name,
                hint="unset it; or use your servers with `restitch deploy` and workers",
            )
    home.create()
    with _alone(home):
        stack = StackFile.read(home.root)
        for process in stack.processes.values():
            if not is_running(process):
                stop_process(process)  # what it left behind when it died holds its port
        known = sum(name.startswith("worker-") for name in stack.processes)
        count = workers if workers is not None else max(known, 1)
        ports = _ports(stack)
        addresses = Addresses(ports)
        runner = _Runner(home, stack.model_copy(update={"ports": ports}), addresses)
        runner.bring([_prefect(home, addresses), _mlflow(home, addresses)], say)
        runner.publish()
        # From here on the engine is on in this process too.
        prepare_environment(home)
        changes = _deployed(addresses, pool)
        runner.bring([_webhook(addresses)], say)
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


def _prefect(home: Home, at: Addresses) -> Plan:
    port = at.ports["prefect"]
    return Plan(
        name="prefect",
        command=_module(
            *("deployments.prefect_server", "server", "start"),
            *("--host", LOOPBACK, "--port", str(port)),
        ),
        environment={
            **SERVER_ENVIRONMENT,
            "PREFECT_HOME": str(home.root / "prefect"),
            # Its pages ask at the standard port otherwise.
            "PREFECT_SERVER_UI_API_URL": at.prefect_api,
        },
        port=port,
        ready=f"{at.prefect_api}/health",
    )


def _mlflow(home: Home, at: Addresses) -> Plan:
    port = at.ports["mlflow"]
    return Plan(
        name="mlflow",
        command=_module(
            *("mlflow", "server", "--host", LOOPBACK, "--port", str(port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{home.root / 'mlflow.db'}"),
            # Clients of this machine write artifacts themselves, with the server and without.
            *("--default-artifact-root", home.mlartifacts.as_uri(), "--no-serve-artifacts"),
        ),
        environment={
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
            "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
            "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": _secret(home, "webhook-encryption-key"),
        },
        port=port,
        ready=f"{at.mlflow}/health",
    )


def _webhook(at: Addresses) -> Plan:
    port = at.ports["webhook"]
    return Plan(
        name="webhook",
        command=_module("cli.main", "webhook", "--port", str(port)),
        environment={
            "RESTITCH_WEBHOOK_SECRET": _secret(Home.from_environment(), "webhook-secret"),
            "PREFECT_API_URL": at.prefect_api,
        },
        port=port,
        ready=f"http://{LOOPBACK}:{port}/health",
    )


def _worker(number: int, pool: str, at: Addresses, count: int) -> Plan:
    name = f"worker-{number}"
    # Workers that all compute with every core stand in each other's way.
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count))
    return Plan(
        name=name,
        command=_module(
            *("prefect", "worker", "start", "--pool", pool, "--type", "process"),
            # One model at a time: a device has no room for two.
            *("--name", f"{socket.gethostname()}-{name}", "--limit", "1"),
        ),
        environment={
            **WORKER_ENVIRONMENT,
            "OMP_NUM_THREADS": threads,
            "PREFECT_API_URL": at.prefect_api,
            "RESTITCH_WORK_POOL": pool,
            "RESTITCH_WORKER": f"{socket.gethostname()}-{name}",
        },
    )


def _module(*command: str) -> tuple[str, ...]:
    return (sys.executable, "-m", *command)


class _Runner:
    """Starts processes and keeps the stack file in step with them."""

    def __init__(self, home: Home, stack: StackFile, addresses: Addresses) -> None:
        self.home = home
        self.stack = stack
        self.addresses = addresses
        self.started: list[str] = []

    def bring(self, plans: list[Plan], say: Say) -> None:
        """Start those that are not running as planned, and wait until all answer."""
        begun = time.monotonic()
        new = [plan for plan in plans if not self._runs(plan)]
        for plan in new:
            self._start(plan)
        for plan in new:
            if plan.ready is not None:
                say(f"waiting for {plan.name} at {plan.ready}")
                self._wait(plan, begun + STARTS_WITHIN)

    def publish(self) -> None:
        """Write the addresses: from here on commands of this home use them."""
        addresses = {
            "prefect_api_url": self.addresses.prefect_api,
            "mlflow_uri": self.addresses.mlflow,
            "webhook_url": self.addresses.webhook,
        }
        self._write(self.stack.model_copy(update=addresses))

    def stop_others(self, workers: set[str]) -> None:
        """Stop the workers that are too many."""
        for name in sorted(self.stack.processes):
            if name.startswith("worker-") and name not in workers:
                stop_process(self.stack.processes[name])
                self._forget(name)

    def _runs(self, plan: Plan) -> bool:
        known = self.stack.processes.get(plan.name)
        if known is None:
            return False
        if is_running(known) and known.serves == plan.digest:
            return True
        stop_process(known)
        self._forget(plan.name)
        return False

    def _start(self, plan: Plan) -> None:
        log = self.home.root / "logs" / f"{plan.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            process = subprocess.Popen(
                plan.command,
                env=_environment(self.home) | plan.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=self.home.root,
                start_new_session=True,
                # In the background Ctrl-C is ignored, and a worker that ignores it never stops.
                preexec_fn=_hear_interrupts,
            )
        entry = StackProcess(
            pid=process.pid,
            began=process_began(process.pid) or time.time(),
            port=plan.port,
            log=str(log),
            serves=plan.digest,
        )
        processes = {**self.stack.processes, plan.name: entry}
        self._write(self.stack.model_copy(update={"processes": processes}))
        self.started.append(plan.name)

    def wait_for_workers(self, plans: list[Plan], pool: str, say: Say) -> None:
        """Wait until Prefect has heard of all workers."""
        from deployments.doctor import workers_online

        deadline = time.monotonic() + STARTS_WITHIN
        for plan in plans:
            say(f"waiting for {plan.name} in pool {pool}")
            name = plan.environment["RESTITCH_WORKER"]
            self._until(lambda name=name: name in workers_online(pool), plan, deadline)  # type: ignore[misc]

    def _wait(self, plan: Plan, deadline: float) -> None:
        self._until(lambda: answers(str(plan.ready)), plan, deadline)

    def _until(self, there: Callable[[], bool], plan: Plan, deadline: float) -> None:
        entry = self.stack.processes[plan.name]
        while time.monotonic() < deadline:
            if there():
                return
            if not is_running(entry):
                break
            time.sleep(0.1)
        tail = Path(entry.log).read_text(errors="replace")[-1500:]
        raise Unavailable(
            f"{plan.name} does not answer",
            found="it is running" if is_running(entry) else f"it ended; its log ends with\n{tail}",
            hint=f"look at {entry.log}, then run `restitch up` again",
        )

    def _forget(self, name: str) -> None:
        processes = {n: p for n, p in self.stack.processes.items() if n != name}
        self._write(self.stack.model_copy(update={"processes": processes}))

    def _write(self, stack: StackFile) -> None:
        stack.write(self.home.root)
        self.stack = stack


def is_running(process: StackProcess) -> bool:
    """Whether a process of the stack is there, and is the very one."""
    return process_began(process.pid) == process.began


def stop_process(process: StackProcess) -> bool:
    """Stop a process and all that it started, also where it has died itself.

    Returns:
        Whether it was running.
    """
    import psutil

    was_running = is_running(process)
    members = _session(process)
    for sent, patience in ((signal.SIGTERM, STOPS_WITHIN), (signal.SIGKILL, 5.0)):
        for member in members:
            with suppress(psutil.Error):
                member.send_signal(sent)
        _, members = psutil.wait_procs(members, timeout=patience)
        if not members:
            break
    return was_running


def _session(process: StackProcess) -> list[Any]:
    """The processes of the session that it leads, or led; nobody else's have its number."""
    import psutil

    found = []
    for one in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError, PermissionError):
            if os.getsid(one.pid) == process.pid and one.create_time() >= process.began - 0.1:
                found.append(one)
    return found


def answers(url: str) -> bool:
    """Whether an address answers with success."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _hear_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _environment(home: Home) -> dict[str, str]:
    """The environment of the stack's processes: no profile and no setting of the user's own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    kept["RESTITCH_HOME"] = str(home.root)
    # Runs are started with `python`: the one that runs this.
    kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    prepare_environment(home, kept)
    return kept


def _ports(stack: StackFile) -> dict[str, int]:
    """The ports of the last time, or free ones where those are taken by somebody else."""
    found: dict[str, int] = {}
    for name in ("prefect", "mlflow", "webhook"):
        port = stack.ports.get(name)
        mine = stack.processes.get(name)
        if port is None or not ((mine is not None and is_running(mine)) or _is_free(port)):
            port = _free_port()
        found[name] = port
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        return int(listener.getsockname()[1])


def _secret(home: Home, name: str) -> str:
    """A secret of this home, made once and readable by its owner only."""
    folder = home.root / "secrets"
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


def _deployed(at: Addresses, pool: str) -> tuple[str, ...]:
    from deployments.deploy import deploy

    os.environ["PREFECT_API_URL"] = at.prefect_api
    try:
        return deploy(pool).changes
    finally:
        # The stack file names the server; the environment is the user's.
        del os.environ["PREFECT_API_URL"]


def _connect_webhook(at: Addresses, home: Home) -> None:
    from deployments.webhook import register_webhook

    register_webhook(at.mlflow, at.webhook, _secret(home, "webhook-secret"))


def _reconcile() -> None:
    """Start a remerge of every line: whatever happened while the stack was down is found now."""
    from deployments.deploy import cron_lines
    from tasks.orchestration import start_run

    for line in cron_lines():
        start_run("remerge", {"line": line}, f"up-{line}-{time.time_ns()}")


@contextmanager
def _alone(home: Home) -> Iterator[None]:
    folder = home.root / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "stack").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
