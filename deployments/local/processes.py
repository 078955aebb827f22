"""The processes of a stack: started as planned, known again, and stopped with all they started.

A process that runs as its plan says is left alone; another one is stopped and started anew.
Each has a session of its own, by which its children are found also after its death.
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
from restitch.deployments.local.health import answers, is_running, workers_online
from restitch.merging.digests import digest_json
from restitch.merging.errors import Unavailable
from restitch.registry.home import Home, prepare_environment
from restitch.registry.stack import StackFile, StackProcess
from restitch.registry.store.attempts import process_began

LOOPBACK = "127.0.0.1"
STARTS_WITHIN = 180.0
STOPS_WITHIN = 15.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """A process as it should be.

    Attributes:
        ready: the address that answers once it is there.
        threads: with how many it computes; another number is no reason to start it anew.
    """

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    port: int | None = None
    ready: str | None = None
    threads: str | None = None

    @property
    def digest(self) -> str:
        """What it serves: another digest, another process."""
        # Whatever name this Python has: `up` is called by path, by link and by `make`.
        return digest_json([list(self.command[1:]), self.environment])


def module(*command: str) -> tuple[str, ...]:
    """The command that runs a Python module with this very Python."""
    return (sys.executable, "-m", *command)


class Runner:
    """Starts processes and keeps the stack file in step with them."""

    def __init__(self, home: Home, stack: StackFile) -> None:
        self.home = home
        self.stack = stack
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

    def publish(self, **addresses: str) -> None:
        """Write the addresses: from here on commands of this home use them."""
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
                env=_environment(self.home, plan),
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
        deadline = time.monotonic() + STARTS_WITHIN
        for plan in plans:
            say(f"waiting for {plan.name} in pool {pool}")
            worker = plan.environment["RESTITCH_WORKER"]
            self._until(partial(_is_among, workers_online, pool, worker), plan, deadline)

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


def _is_among(online: Callable[[str], list[str]], pool: str, worker: str) -> bool:
    return worker in online(pool)


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


def ports_of(stack: StackFile) -> dict[str, int]:
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


def _environment(home: Home, plan: Plan) -> dict[str, str]:
    """A process's environment: no profile of the user's own, and none of his Prefect settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    for name in VARIABLES:  # the servers' passwords are no business of the workers
        kept.pop(name, None)
    kept["RESTITCH_HOME"] = str(home.root)
    # Runs are started with `python`: the one that runs this.
    kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    prepare_environment(home, kept)
    if plan.threads is not None:
        kept.setdefault("OMP_NUM_THREADS", plan.threads)
    return kept | plan.environment


def _hear_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
