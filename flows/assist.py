"""Help with work that another process offers: parts of a merge, evaluations, shards of an export.

`tasks.runtime.sharing` describes how processes share work. A helper takes the pieces that nobody
else does, and ends when none is left. It changes no line.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from restitch.flows.outcome import Outcome
from restitch.merging.errors import RestitchError
from restitch.tasks.evaluate import Evaluations
from restitch.tasks.export import Shards
from restitch.tasks.merge import PatchParts
from restitch.tasks.runtime.console import say, warn
from restitch.tasks.runtime.engine import flow
from restitch.tasks.runtime.sharing import Offer, Pieces, Work, offers, take_part
from restitch.tasks.runtime.workspace import Workspace, workspace

_KINDS: Mapping[str, Callable[[Any, Workspace], Pieces]] = {
    PatchParts.kind: PatchParts.of,
    Evaluations.kind: Evaluations.of,
    Shards.kind: Shards.of,
}


@dataclass(frozen=True)
class AssistOutcome(Outcome):
    """The help with one offer.

    Attributes:
        kind: the kind of the work; None if it was over.
        pieces: the numbers of the pieces that this process did, from 0.
        count: the number of all pieces.
        declined: why this process cannot help.
    """

    line: str
    kind: str | None
    pieces: tuple[int, ...] = ()
    count: int = 0
    declined: str | None = None


@flow("assist", "{line}")
def assist(line: str, offer: str) -> AssistOutcome:
    """Help with the work of an offer until nothing is left to do.

    Args:
        line: the line of the work.
        offer: its identity in the store.
    """
    space = workspace()
    found = Offer(space.objects.store, offer)
    work = found.work()
    if work is None:
        say(f"{line}: the work is done")
        return AssistOutcome(line, None)
    pieces, declined = _pieces(work, space)
    if pieces is None:
        say(f"{line}: this worker cannot help with {work.kind}: {declined}")
        return AssistOutcome(line, work.kind, (), len(work.keys), declined)
    found.open()
    try:
        done = take_part(space, found, pieces)
    finally:
        found.close()
    say(f"{line}: did {len(done)} of {len(work.keys)} pieces of {work.kind}")
    return AssistOutcome(line, work.kind, done, len(work.keys))


def assist_all(
    line: str | None = None, *, idle: float | None = None, every: float = 2.0
) -> Iterator[AssistOutcome]:
    """Help with everything that is offered in the store.

    Args:
        line: help with this line only.
        idle: end when nothing was offered for so many seconds; None goes on.
        every: the seconds between two looks.
    """
    store = workspace().objects.store
    known: dict[str, Offer] = {}
    helped: set[str] = set()
    quiet_since = time.monotonic()
    while True:
        present = offers(store)
        helped &= set(present)
        for identity in present:
            work = known.setdefault(identity, Offer(store, identity)).work()
            if work is None or identity in helped or line not in (None, work.line):
                continue
            helped.add(identity)
            try:
                yield assist.body(work.line, identity)
            except RestitchError as error:  # the process that needs the work will meet it too
                warn(f"{work.line}: no help with {work.kind}: {error.message()}")
            quiet_since = time.monotonic()
        if idle is not None and time.monotonic() - quiet_since >= idle:
            return
        time.sleep(every)


def _pieces(work: Work, space: Workspace) -> tuple[Pieces | None, str | None]:
    """The pieces as this process would make them, or why they would be others."""
    if work.kind not in _KINDS:
        return None, "its release of restitch does not know this work"
    pieces = _KINDS[work.kind](work.content, space)
    if pieces.work.keys != work.keys:
        return None, "its results would be others: it has another device, release or thread count"
    return pieces, None
