"""How often work on something was begun and never ended: what kills its worker shows here.

An attempt is an object `attempts/<digest of the subject>/<number>.begun`, and a second one
`.ended` when the work came to an orderly end, also with an explained error. What was begun,
has not ended, and whose process is gone, died. Numbers are given by create-only puts, so
that workers of several hosts never share one.
"""

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from restitch.merging.digests import digest_json
from restitch.merging.errors import RestitchError
from restitch.registry.store.base import Store

# Longer than any work takes: without a sign of life, somebody else's attempt is given up.
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
        """Whether it was made on this host."""
        return bool(self.facts.get("host") == socket.gethostname())

    def is_alive(self, run_ended: Callable[[str], bool] | None = None) -> bool:
        """Whether its process may still be at work.

        Args:
            run_ended: asks the engine about a run on another host.
        """
        if self.facts.get("failed"):
            return False
        if self.is_here:
            return bool(process_began(int(self.facts["pid"])) == self.facts["process_began"])
        if self.run is not None and run_ended is not None:
            return not run_ended(self.run)
        begun = datetime.fromisoformat(str(self.facts["time"]))
        return datetime.now(UTC) - begun < GIVEN_UP_AFTER

    def __str__(self) -> str:
        return f"attempt {self.number} on {self.facts['host']}, process {self.facts['pid']}"


class Attempts:
    """The attempts at one piece of work.

    Args:
        store: where they are remembered.
        subject: what the work is about; the same subject, the same attempts.
    """

    def __init__(self, store: Store, *subject: Any) -> None:
        self.store = store
        self.prefix = f"attempts/{digest_json(list(subject))}"

    @contextmanager
    def attempt(self, run: str | None = None) -> Iterator[Attempt]:
        """Make an attempt; it ends with the context, unless the process dies in it.

        An error that nobody foresaw does not end it: it counts as a death.
        """
        number = max(self._numbers("begun"), default=0) + 1
        facts: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_began": process_began(os.getpid()),
            "time": datetime.now(UTC).isoformat(),
            "run": run,
        }
        while not self._put(number, "begun", facts):
            number += 1
        try:
            yield Attempt(number, facts)
        except RestitchError:
            self._put(number, "ended", {})
            raise
        except Exception as error:
            self._put(number, "failed", {"error": f"{type(error).__name__}: {error}"[:500]})
            raise
        except BaseException:  # told to stop
            self._put(number, "ended", {})
            raise
        self._put(number, "ended", {})

    @property
    def count(self) -> int:
        """How many there were."""
        return len(self._numbers("begun"))

    def unfinished(self) -> list[Attempt]:
        """The attempts that were begun and have not ended."""
        failed = self._numbers("failed")
        found = []
        for number in sorted(self._numbers("begun") - self._numbers("ended")):
            facts = json.loads(self.store.read(self._name(number, "begun")))
            found.append(Attempt(number, {**facts, "failed": number in failed}))
        return found

    def _put(self, number: int, what: str, facts: dict[str, Any]) -> bool:
        return self.store.put(self._name(number, what), json.dumps(facts).encode())

    def _numbers(self, what: str) -> set[int]:
        names = (name.rpartition("/")[2].partition(".") for name in self.store.list(self.prefix))
        return {int(number) for number, _, kind in names if kind == what}

    def _name(self, number: int, what: str) -> str:
        return f"{self.prefix}/{number:04d}.{what}"


def process_began(pid: int) -> float | None:
    """When a process of this host began, in seconds since the epoch; None if it is gone."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None
