"""Start and stop the processes of a stack, with their children.

A process that runs as planned is left alone; a process that differs from its plan is restarted.
Each leads a session of its own, which identifies its children even after it died.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from restitch.deployments.local.databases import VARIABLES
from restitch.deployments.local.health import answers, is_running
from restitch.merging.digests import digest_json
from restitch.merging.errors import Unavailable
from restitch.registry.home import Home, prepare_environment
from restitch.registry.stack import StackFile, StackProcess
from restitch.registry.store.attempts import process_began
from restitch.tasks.runtime.events import api

LOOPBACK = "127.0.0.1"
STARTS_WITHIN = 180.0
STOPS_WITHIN = 15.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """A process as it should be.

    Attributes:
        ready: the address that answers once the process is ready.
        threads: its number of compute threads; a change alone does not restart it.
    """

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    port: int | None = None
    ready: str | None = None
    threads: str | None = None

    @property
    def digest(self) -> str:
        """The digest of command and environment; a change of it restarts the process."""
        # Without Python's own path: `up` is called by path, by link and by `make`.
        return digest_json([list(self.command[1:]), self.environment])


def module(*command: str) -> tuple[str, ...]:
    """The command that runs a module with this Python."""
    return (sys.executable, "-m", *command)


class Runner:
    """Starts processes and keeps the stack file up to date."""

    def __init__(self, home: Home, stack: StackFile) -> None:
        self.home = home
        self.stack = stack
        self.started: list[str] = []

    def ensure(self, plans: list[Plan], say: Say) -> None:
        """Start each process that does not run as planned, and wait until all answer."""
        started = time.monotonic()
        new = [plan for plan in plans if not self._runs(plan)]
        for plan in new:
            self._start(plan)
        for plan in new:
            if plan.ready is not None:
                say(f"waiting for {plan.name} at {plan.ready}")
                self._wait(plan, started + STARTS_WITHIN)

    def publish(self, **addresses: str) -> None:
        """Write the addresses; from now on commands of this home use them."""
        self._write(self.stack.model_copy(update=addresses))

    def stop_others(self, workers: set[str]) -> None:
        """Stop all workers but these."""
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
                env=_environment(self.home, plan),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=self.home.root,
                start_new_session=True,
                # In the background Ctrl-C is ignored, and a worker that ignores it never stops.
                preexec_fn=_allow_interrupts,
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
        """Wait until Prefect knows all workers."""
        deadline = time.monotonic() + STARTS_WITHIN
        for plan in plans:
            say(f"waiting for {plan.name} in pool {pool}")
            worker = plan.environment["RESTITCH_WORKER"]
            self._until(partial(_is_online, worker, pool), plan, deadline)

    def _wait(self, plan: Plan, deadline: float) -> None:
        self._until(lambda: answers(str(plan.ready)), plan, deadline)

    def _until(self, is_ready: Callable[[], bool], plan: Plan, deadline: float) -> None:
        entry = self.stack.processes[plan.name]
        while time.monotonic() < deadline:
            if is_ready():
                return
            if not is_running(entry):
                break
            time.sleep(0.1)
        tail = Path(entry.log).read_text(errors="replace")[-1500:]
        raise Unavailable(
            f"{plan.name} does not answer",
            found="it is running" if is_running(entry) else f"it ended; its log ends with\n{tail}",
            hint=f"read {entry.log}, then run `restitch up` again",
        )

    def _forget(self, name: str) -> None:
        processes = {n: p for n, p in self.stack.processes.items() if n != name}
        self._write(self.stack.model_copy(update={"processes": processes}))

    def _write(self, stack: StackFile) -> None:
        stack.write(self.home.root)
        self.stack = stack


def _is_online(worker: str, pool: str) -> bool:
    return worker in api().online_workers(pool)


def stop_process(process: StackProcess) -> bool:
    """Stop a process and its children, even if the process itself has died.

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
    """The processes of the session that a process leads, or led before it died."""
    import psutil

    members = []
    for one in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError, PermissionError):
            if os.getsid(one.pid) == process.pid and one.create_time() >= process.began - 0.1:
                members.append(one)
    return members


def ports_of(stack: StackFile) -> dict[str, int]:
    """The ports of the last time, or free ones if another program took those."""
    ports: dict[str, int] = {}
    for name in ("prefect", "mlflow", "webhook"):
        port = stack.ports.get(name)
        server = stack.processes.get(name)
        if port is None or not ((server is not None and is_running(server)) or _is_free(port)):
            port = _free_port()
        ports[name] = port
    return ports


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


def _environment(home: Home, plan: Plan) -> dict[str, str]:
    """A process's environment, without the user's own settings of Prefect."""
    # Workers must not see the passwords of the servers' databases.
    variables = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PREFECT_") and name not in VARIABLES
    }
    variables["RESTITCH_HOME"] = str(home.root)
    # Workers start runs with `python`, which must be this one.
    path = [str(Path(sys.executable).parent), variables.get("PATH", "")]
    variables["PATH"] = os.pathsep.join(path)
    prepare_environment(home, variables)
    if plan.threads is not None:
        variables.setdefault("OMP_NUM_THREADS", plan.threads)
    return variables | plan.environment


def _allow_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
