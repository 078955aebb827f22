"""The attempts at a piece of work, so that work which kills its worker is recognized.

An attempt is an object `attempts/<digest of the subject>/<number>.begun`, and a second one
`.ended` when the work succeeds or fails with an explained error. An attempt without an end
whose process is gone has died. Numbers are claimed by create-only puts, so that workers on
several hosts never share one.
"""

import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from restitch.merging.digests import digest_json
from restitch.merging.errors import RestitchError
from restitch.registry.store.base import Store

# Longer than any work takes: an older attempt on a host that we cannot ask counts as dead.
GIVEN_UP_AFTER = timedelta(days=1)


@dataclass(frozen=True)
class Attempt:
    """One attempt.

    Attributes:
        facts: host, pid, when its process began, when the work began, and the run's id.
    """

    number: int
    facts: dict[str, Any]

    @property
    def run(self) -> str | None:
        """The flow run that made the attempt."""
        run: str | None = self.facts.get("run")
        return run

    @property
    def is_here(self) -> bool:
        """True if it was made on this host."""
        return bool(self.facts.get("host") == socket.gethostname())

    def is_alive(self, run_ended: Callable[[str], bool] | None = None) -> bool:
        """True if its process may still run; `run_ended` tells it of a run on another host."""
        if self.facts.get("failed"):
            return False
        if not self.is_here and self.run is not None and run_ended is not None:
            return not run_ended(self.run)
        return may_run(self.facts, GIVEN_UP_AFTER)

    def __str__(self) -> str:
        return f"attempt {self.number} on {self.facts['host']}, process {self.facts['pid']}"


class Attempts:
    """The attempts at one piece of work, which the JSON values of its subject identify."""

    def __init__(self, store: Store, *subject: Any) -> None:
        self.store = store
        self.prefix = f"attempts/{digest_json(list(subject))}"

    @contextmanager
    def attempt(self, run: str | None = None) -> Iterator[Attempt]:
        """Record an attempt, which ends with the context unless the process dies.

        An unexpected error counts as a death.
        """
        number = max(self._numbers("begun"), default=0) + 1
        facts = {**this_process(), "run": run}
        while not self._put(number, "begun", facts):
            number += 1
        failure: dict[str, Any] = {}
        try:
            yield Attempt(number, facts)
        except Exception as error:
            if not isinstance(error, RestitchError):
                failure = {"error": f"{type(error).__name__}: {error}"[:500]}
            raise
        finally:
            self._put(number, "failed" if failure else "ended", failure)

    @property
    def count(self) -> int:
        """The number of attempts so far."""
        return len(self._numbers("begun"))

    def unfinished(self) -> list[Attempt]:
        """The attempts that have begun and not ended."""
        failed = self._numbers("failed")
        attempts = []
        for number in sorted(self._numbers("begun") - self._numbers("ended")):
            facts = json.loads(self.store.read(self._name(number, "begun")))
            attempts.append(Attempt(number, {**facts, "failed": number in failed}))
        return attempts

    def _put(self, number: int, event: str, facts: dict[str, Any]) -> bool:
        return self.store.put(self._name(number, event), json.dumps(facts).encode())

    def _numbers(self, event: str) -> set[int]:
        names = (name.rpartition("/")[2].partition(".") for name in self.store.list(self.prefix))
        return {int(number) for number, _, kind in names if kind == event}

    def _name(self, number: int, event: str) -> str:
        return f"{self.prefix}/{number:04d}.{event}"


def this_process() -> dict[str, Any]:
    """This process as `may_run` recognizes it, and the time."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_began": process_began(os.getpid()),
        "time": datetime.now(UTC).isoformat(),
    }


def may_run(process: Mapping[str, Any], given_up_after: timedelta) -> bool:
    """True if a process still runs; of one on another host only its age is known."""
    if process["host"] == socket.gethostname():
        return bool(process_began(int(process["pid"])) == process["process_began"])
    return datetime.now(UTC) - datetime.fromisoformat(process["time"]) < given_up_after


def process_began(pid: int) -> float | None:
    """The start of a process on this host, in seconds since the epoch; None if it is gone."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None
