"""One remerge per line at a time: saves work, decides nothing.

On one host a file lock keeps remerges apart. Among hosts there are two slots per line, both
concurrency limits of the Prefect server held by leases: `merge` for the remerge at work and
`next` for one that waits and has not yet looked at the line. Whoever finds `next` taken may
go home: the one that waits will see all that it would. A lease outlives its holder by up to
a minute, so the holder is written beside the store's lines, and one that is known to be dead
is relieved of its lease at once. Where the server is away, or a slot was lost with it, a
remerge goes on without a turn: the compare-and-swap on the head keeps it right.
"""

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from restitch.merging.errors import Unavailable
from restitch.registry.store.attempts import process_began
from restitch.registry.store.base import NotInStore, Store
from restitch.tasks.runtime.console import say, warn
from restitch.tasks.runtime.events import api, cancel_queued, run_ended, this_run
from restitch.tasks.runtime.prefect_api import PrefectApi
from restitch.tasks.runtime.workspace import Workspace

# The shortest lease that the server grants; it is renewed while the process lives.
LEASE_SECONDS = 60.0
LOOK_EVERY_SECONDS = 1.0
# A slot that is taken and that nobody alive holds was lost with the server.
LOST_AFTER_SECONDS = 2 * LEASE_SECONDS


@contextmanager
def turn(space: Workspace, line: str) -> Iterator[bool]:
    """Wait for the line's turn.

    Yields:
        Whether this remerge should go on; not where another one waits already.
    """
    with ExitStack() as held:
        mine = _among_hosts(held, space.objects.store, line) if this_run() is not None else True
        if mine:
            held.enter_context(_on_this_host(space, line))
        yield mine


def _among_hosts(held: ExitStack, store: Store, line: str) -> bool:
    try:
        server = api()
        waiting = Slot(server, store, line, "next")
        if not waiting.take(wait=False):
            say(f"{line}: another remerge waits and will look at it")
            return False
        try:
            cancel_queued(line)
            merging = Slot(server, store, line, "merge")
            merging.take(wait=True)
            held.callback(merging.release)
        finally:
            # Before this one looks at the line: who comes later must not rely on it.
            waiting.release()
    except Unavailable as error:
        warn(f"remerging {line} without a turn: {error.message()}")
    return True


@contextmanager
def _on_this_host(space: Workspace, line: str) -> Iterator[None]:
    folder = space.home.root / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"remerge-{line}").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class _Holder:
    """Who took a slot last."""

    lease: str
    run: str
    host: str
    pid: int
    began: float | None

    def is_dead(self) -> bool:
        """Whether its process is gone, or its run is over."""
        if self.host == socket.gethostname():
            return process_began(self.pid) != self.began
        return run_ended(self.run)


class Slot:
    """One of a line's two slots."""

    def __init__(self, server: PrefectApi, store: Store, line: str, place: str) -> None:
        self.server = server
        self.store = store
        self.name = f"restitch.{line}.{place}"
        self.record = f"turns/{line}.{place}.json"
        self.lease: str | None = None
        self._released = threading.Event()

    def take(self, *, wait: bool) -> bool:
        """Take the slot.

        Args:
            wait: until it is free; otherwise only if it is, or if its holder is dead.

        Returns:
            Whether it was taken. With `wait` always true, also where the slot was lost.
        """
        self.server.ensure_limit(self.name, 1)
        lost_at = time.monotonic() + LOST_AFTER_SECONDS
        while True:
            lease = self.server.take_lease(self.name, LEASE_SECONDS, str(this_run()))
            if lease is not None:
                self._hold(lease)
                return True
            holder = self._holder()
            if holder is not None and not holder.is_dead():
                if not wait:
                    return False
                lost_at = time.monotonic() + LOST_AFTER_SECONDS
            else:
                if holder is not None:
                    self.server.release_lease(holder.lease)
                if time.monotonic() > lost_at:
                    warn(f"{self.name} is taken and nobody holds it: it is freed")
                    self.server.free_limit(self.name)
            time.sleep(LOOK_EVERY_SECONDS)

    def release(self) -> None:
        """Give the slot back; where the server is away it frees itself."""
        self._released.set()
        if self.lease is not None:
            with suppress(Unavailable):
                self.server.release_lease(self.lease)

    def _hold(self, lease: str) -> None:
        self.lease = lease
        holder: dict[str, Any] = {
            "lease": lease,
            "run": str(this_run()),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "began": process_began(os.getpid()),
        }
        self.store.swap(self.record, self._tag(), json.dumps(holder).encode())
        threading.Thread(target=self._renew, name=f"lease of {self.name}", daemon=True).start()

    def _renew(self) -> None:
        while not self._released.wait(LEASE_SECONDS / 2):
            with suppress(Unavailable):  # it may come back before the lease ends
                self.server.renew_lease(str(self.lease), LEASE_SECONDS)

    def _holder(self) -> _Holder | None:
        with suppress(NotInStore, ValueError, TypeError):
            return _Holder(**json.loads(self.store.read(self.record)))
        return None

    def _tag(self) -> str | None:
        with suppress(NotInStore):
            return self.store.read_tagged(self.record).tag
        return None
