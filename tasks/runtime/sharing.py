"""Share the pieces of one work among processes, and find the pieces that were done before.

    the process that needs the work --> offers it in the store --> starts runs of `assist`
    every process --> claims a piece --> does it --> its result lies in the store under its key

The process that needs the work does it piece by piece, alone if nobody helps. Work that goes on for
`RESTITCH_SHARE_AFTER` seconds is offered: an object in the store says what it is, and workers that
are idle are asked to help. A claim keeps two processes from doing the same piece; it is renewed
while its process lives, so that the piece of a dead one is taken by another. Claims save work, and
correctness does not depend on them: a key's first result stays.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from restitch.merging.digests import digest_json
from restitch.merging.errors import BadInput, RestitchError
from restitch.registry.sizes import parse_size
from restitch.registry.store.attempts import process_began, this_process
from restitch.registry.store.base import NotInStore, Store
from restitch.tasks.runtime.console import say, warn
from restitch.tasks.runtime.engine import Cached
from restitch.tasks.runtime.events import call_helpers, dismiss_helpers
from restitch.tasks.runtime.workspace import Workspace, made_by

SHARE_AFTER, PART_SIZE = "RESTITCH_SHARE_AFTER", "RESTITCH_PART_SIZE"
# A helper starts and opens the model in ten to thirty seconds: shorter work gains nothing.
_SHARE_AFTER, _PART_SIZE = 60.0, "4GB"

OFFERS = "offers"
RENEW_SECONDS = 30.0
# A process on another host that did not renew for this long is dead.
LOST_AFTER = 4 * RENEW_SECONDS
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Work:
    """Work in pieces, whose results go into the store.

    Attributes:
        line: the line that it is for.
        kind: the name of what a helper does.
        content: JSON values from which another process makes the same pieces.
        results: the kind of the results' keys.
        keys: the digest of the inputs of each piece.
    """

    line: str
    kind: str
    content: Any
    results: str
    keys: tuple[str, ...]

    @property
    def identity(self) -> str:
        """The digest by which processes find it."""
        return digest_json(asdict(self))


class Pieces(Protocol):
    """What a helper needs to take part in some work."""

    work: Work

    def do(self, number: int) -> object:
        """Make the result of a piece and store it."""


def share_after() -> float:
    """The seconds after which work is shared.

    Raises:
        BadInput: the variable is not a number.
    """
    text = os.environ.get(SHARE_AFTER) or str(_SHARE_AFTER)
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise BadInput(
            f"{SHARE_AFTER} is not a number of seconds",
            expected="0 or more; inf works alone",
            found=repr(text),
        )
    return seconds


def part_size() -> int:
    """The bytes of the base's weights that a part of a merge takes.

    Raises:
        BadInput: the variable is not a size.
    """
    text = os.environ.get(PART_SIZE) or _PART_SIZE
    try:
        return parse_size(text)
    except BadInput as error:
        raise BadInput(
            f"{PART_SIZE} is not a size", expected="a size such as 4GB or 500MB", found=repr(text)
        ) from error


def is_done(space: Workspace, work: Work, number: int) -> bool:
    """True if the result of a piece is in the store."""
    return space.objects.lookup(work.results, work.keys[number]) is not None


def stored(
    space: Workspace, work: Work, number: int, write: Callable[[Path], str | None]
) -> str | Cached[str]:
    """The digest of a piece that is a file, from the store or written now.

    `write` returns the digest of the file if it computed that from the bytes that it wrote.
    """
    objects, key = space.objects, work.keys[number]
    record = objects.lookup(work.results, key)
    if record is not None:
        return Cached(record.blob)
    with space.scratch() as scratch:
        file = scratch / "piece"
        blob = objects.put_blob(file, digest=write(file), move=True)
    return objects.publish(work.results, key, blob, made_by()).blob


class Offer:
    """Work in the store that others may take part in, and the claims on its pieces.

    What this process offers and claims is renewed from `open` to `close`.
    """

    def __init__(self, store: Store, identity: str) -> None:
        self.store = store
        self.identity = identity
        self._prefix = f"{OFFERS}/{identity}"
        self._lock = threading.Lock()
        self._held: dict[str, tuple[dict[str, Any], str]] = {}
        self._seen: dict[str, tuple[str, float]] = {}
        self._closed = threading.Event()

    def open(self) -> None:
        """Renew claims from now on."""
        threading.Thread(target=self._renew, name="claims", daemon=True).start()

    def close(self) -> None:
        """Renew nothing any more."""
        self._closed.set()

    def make(self, work: Work) -> None:
        """Offer the work, in place of an offer that a dead process left."""
        name, values = self._name(None), {**this_process(), "work": asdict(work)}
        tag = self.store.swap(name, self._tag(name), json.dumps(values).encode())
        if tag is not None:
            with self._lock:
                self._held[name] = values, tag

    def withdraw(self) -> None:
        """Remove the offer and all claims."""
        with self._lock:
            self._held.clear()
            for name in list(self.store.list(self._prefix)):
                self.store.remove(name)

    def work(self) -> Work | None:
        """The work that is offered now; None if there is none, or its process is dead."""
        try:
            tagged = self.store.read_tagged(self._name(None))
        except NotInStore:
            return None
        values = json.loads(tagged.data)
        if not self._is_alive(self._name(None), values, tagged.tag):
            return None
        work = values["work"]
        return Work(
            line=work["line"],
            kind=work["kind"],
            content=work["content"],
            results=work["results"],
            keys=tuple(work["keys"]),
        )

    def claim(self, number: int) -> bool:
        """Claim a piece; False while another living process has it."""
        name, before = self._name(number), None
        try:
            tagged = self.store.read_tagged(name)
        except NotInStore:
            pass
        else:
            if self._is_alive(name, json.loads(tagged.data), tagged.tag):
                return False
            before = tagged.tag
        values = this_process()
        tag = self.store.swap(name, before, json.dumps(values).encode())
        if tag is None:
            return False
        with self._lock:
            self._held[name] = values, tag
        return True

    def release(self, number: int) -> None:
        """Give up a claim; a piece without a result can then be claimed again."""
        self._drop(self._name(number))

    def _drop(self, name: str) -> None:
        with self._lock:
            if self._held.pop(name, None) is not None:
                self.store.remove(name)

    def _renew(self) -> None:
        while not self._closed.wait(RENEW_SECONDS):
            with self._lock:
                for name, (values, tag) in list(self._held.items()):
                    now = {**values, "renewed": time.time()}
                    try:
                        new = self.store.swap(name, tag, json.dumps(now).encode())
                    except RestitchError:  # the store may return before the claim is lost
                        continue
                    if new is None:
                        del self._held[name]  # another process took it
                    else:
                        self._held[name] = now, new

    def _is_alive(self, name: str, process: dict[str, Any], tag: str) -> bool:
        if process["host"] == this_process()["host"]:
            return bool(process_began(int(process["pid"])) == process["process_began"])
        # Clocks of hosts differ: what counts is whether it changes while this process looks.
        known, since = self._seen.get(name, (None, 0.0))
        if known != tag:
            self._seen[name] = tag, time.monotonic()
            return True
        return time.monotonic() - since < LOST_AFTER

    def _tag(self, name: str) -> str | None:
        try:
            return self.store.read_tagged(name).tag
        except NotInStore:
            return None

    def _name(self, number: int | None) -> str:
        return f"{self._prefix}/{'work' if number is None else number}.json"


@contextmanager
def sharing(space: Workspace, work: Work, *, after: float | None = None) -> Iterator[Iterator[int]]:
    """Take turns with helpers, in the process that needs the work.

    Args:
        space: the workspace.
        work: the work.
        after: the seconds after which the work is offered, or infinity; None takes the setting.

    Yields:
        The number of each piece once: to do it here, or to read the result of a helper.
    """
    shared = _Shared(space, work)
    seconds = share_after() if after is None else after
    timer = threading.Timer(seconds, copy_context().run, [shared.begin])
    timer.daemon = True
    if len(work.keys) > 1 and seconds <= threading.TIMEOUT_MAX:
        timer.start()
    try:
        yield shared.turns()
    finally:
        timer.cancel()
        shared.end()


class _Shared:
    """The turns of the process that needs the work."""

    def __init__(self, space: Workspace, work: Work) -> None:
        self._space, self._work = space, work
        self._lock = threading.Lock()
        self._left = list(range(len(work.keys)))
        self._current: int | None = None
        self._offer: Offer | None = None
        self._runs: tuple[str, ...] = ()
        self._ended = threading.Event()

    def begin(self) -> None:
        """Offer the pieces that are left, if helpers can save time, and ask for help."""
        try:
            with self._lock:
                waiting = len(self._left) - 1  # this process is at one, or about to be
                if self._ended.is_set() or waiting < 1:
                    return
                offer = Offer(self._space.objects.store, self._work.identity)
                if self._current is not None:
                    offer.claim(self._current)
                offer.make(self._work)
                offer.open()
                self._offer = offer
            runs = call_helpers(self._work.line, offer.identity, waiting)
            if runs:
                say(f"{self._work.line}: asked {len(runs)} workers to help")
            with self._lock:
                self._runs = runs
                if self._ended.is_set():
                    dismiss_helpers(runs)
        except RestitchError as error:
            warn(f"no worker is asked to help: {error.message()}")

    def turns(self) -> Iterator[int]:
        theirs: list[int] = []
        while (number := self._next(theirs)) is not None:
            yield number
            with self._lock:
                self._current = None
                self._left.remove(number)
                if self._offer is not None:
                    self._offer.release(number)
        yield from theirs

    def end(self) -> None:
        """Withdraw the offer, and the runs that no worker has begun."""
        with self._lock:
            self._ended.set()
            if self._offer is None:
                return
            try:
                self._offer.withdraw()
                self._offer.close()
                dismiss_helpers(self._runs)
            except RestitchError as error:  # the work itself is done
                warn(f"an offer of work is not withdrawn: {error.message()}")

    def _next(self, theirs: list[int]) -> int | None:
        while True:
            with self._lock:
                for number in list(self._left):
                    if self._offer is None or self._is_mine(self._offer, number, theirs):
                        self._current = number
                        return number
                if not self._left:
                    return None
            time.sleep(POLL_SECONDS)

    def _is_mine(self, offer: Offer, number: int, theirs: list[int]) -> bool:
        """True if this process claimed the piece; one that is done counts as a helper's."""
        if is_done(self._space, self._work, number):
            self._left.remove(number)
            theirs.append(number)
            return False
        return offer.claim(number)


def take_part(space: Workspace, offer: Offer, pieces: Pieces) -> tuple[int, ...]:
    """Do the pieces of offered work that nobody else does, in a helper.

    Returns:
        The pieces that were done here.
    """
    done: list[int] = []
    for number in range(len(pieces.work.keys)):
        if offer.work() is None:
            break
        if is_done(space, pieces.work, number) or not offer.claim(number):
            continue
        try:
            if not is_done(space, pieces.work, number):  # just before this claim
                pieces.do(number)
                done.append(number)
        finally:
            offer.release(number)
    return tuple(done)


def offers(store: Store) -> Sequence[str]:
    """The identities of all work that is offered in a store."""
    names = (name.split("/") for name in store.list(OFFERS))
    return sorted({parts[1] for parts in names if parts[-1] == "work.json"})
