"""Run one remerge per line at a time. This saves work; correctness does not depend on it.

On one host a file lock serializes remerges. Across hosts each line has two slots, which are
concurrency limits of the Prefect server held by leases: `merge` for the running remerge and `next`
for one that waits and has not read the line yet. A remerge that finds `next` taken can stop: the
waiting one will see everything that it would.

A lease outlives a dead process by up to a minute. The holder of a slot is therefore recorded in the
store, and the lease of a holder that is known to be dead is released at once. Without the server,
or when a slot was lost with it, remerges run without a lease: the compare-and-swap on the line's
state keeps them correct.
"""

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass

from restitch.merging.errors import Unavailable
from restitch.registry.store.attempts import process_began
from restitch.registry.store.base import NotInStore, Store
from restitch.tasks.runtime.console import say, warn
from restitch.tasks.runtime.events import api, cancel_queued, run_ended, this_run
from restitch.tasks.runtime.prefect_api import PrefectApi
from restitch.tasks.runtime.workspace import Workspace

# The shortest lease that the server grants; it is renewed while the process lives.
LEASE_SECONDS = 60.0
POLL_SECONDS = 1.0
# A slot that is taken without a living holder for this long was lost with the server.
LOST_AFTER_SECONDS = 2 * LEASE_SECONDS


@contextmanager
def merge_lease(space: Workspace, line: str) -> Iterator[bool]:
    """Wait until no other remerge of the line runs, and keep others waiting.

    Yields:
        False when another remerge already waits; this one should stop then.
    """
    with ExitStack() as leases:
        acquired = this_run() is None or _across_hosts(leases, space.objects.store, line)
        if acquired:
            leases.enter_context(_on_this_host(space, line))
        yield acquired


def _across_hosts(leases: ExitStack, store: Store, line: str) -> bool:
    try:
        server = api()
        waiting = Slot(server, store, line, "next")
        if not waiting.take(wait=False):
            say(f"{line}: another remerge is waiting and covers this one")
            return False
        try:
            cancel_queued(line)
            merging = Slot(server, store, line, "merge")
            merging.take(wait=True)
            leases.callback(merging.release)
        finally:
            # Before this one reads the line: later remerges must not rely on it.
            waiting.release()
    except Unavailable as error:
        warn(f"remerging {line} without a lease: {error.message()}")
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
    """The process that took a slot last."""

    lease: str
    run: str
    host: str
    pid: int
    began: float | None

    def is_dead(self) -> bool:
        """True if its process is gone or its run is over."""
        if self.host == socket.gethostname():
            return process_began(self.pid) != self.began
        return run_ended(self.run)


class Slot:
    """One of a line's two slots, `merge` or `next`."""

    def __init__(self, server: PrefectApi, store: Store, line: str, name: str) -> None:
        self.server = server
        self.store = store
        self.name = f"restitch.{line}.{name}"
        self.record = f"leases/{line}.{name}.json"
        self.lease: str | None = None
        self._released = threading.Event()

    def take(self, *, wait: bool) -> bool:
        """Take the slot.

        Args:
            wait: wait until it is free; otherwise take it only if it is free or its holder dead.

        Returns:
            Whether it was taken; always true with `wait`.
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
                    warn(
                        f"freeing the concurrency limit {self.name}: it is taken, but has no holder"
                    )
                    self.server.free_limit(self.name)
            time.sleep(POLL_SECONDS)

    def release(self) -> None:
        """Release the slot; without the server its lease expires."""
        self._released.set()
        if self.lease is not None:
            with suppress(Unavailable):
                self.server.release_lease(self.lease)

    def _hold(self, lease: str) -> None:
        self.lease = lease
        pid = os.getpid()
        holder = _Holder(lease, str(this_run()), socket.gethostname(), pid, process_began(pid))
        self.store.swap(self.record, self._tag(), json.dumps(asdict(holder)).encode())
        threading.Thread(target=self._renew, name=f"lease of {self.name}", daemon=True).start()

    def _renew(self) -> None:
        while not self._released.wait(LEASE_SECONDS / 2):
            with suppress(Unavailable):  # the server may return before the lease expires
                self.server.renew_lease(str(self.lease), LEASE_SECONDS)

    def _holder(self) -> _Holder | None:
        with suppress(NotInStore, ValueError, TypeError):
            return _Holder(**json.loads(self.store.read(self.record)))
        return None

    def _tag(self) -> str | None:
        with suppress(NotInStore):
            return self.store.read_tagged(self.record).tag
        return None
