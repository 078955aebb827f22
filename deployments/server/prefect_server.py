"""Run Prefect's server on SQLite so that writes queue instead of failing under load.

    python -m restitch.deployments.server.prefect_server server start ...

The arguments are those of `python -m prefect`. SQLite has one writer at a time. Prefect begins most
transactions by reading, and asks for the write lock later. If another transaction holds the lock
then, SQLite refuses at once, for a long timeout too, and the server answers 503. Prefect's clients
try again; its pages do not, and show an error. This module makes each transaction ask for the lock
when it begins, in the order of arrival.

Transactions wait for their turn in the event loop and not in SQLite. Prefect lets a connection wait
60 seconds for a lock. Sometimes Python's garbage collector closes a cursor of such a connection in
the thread of the event loop and waits there for the connection; the holder of the lock needs that
thread to commit, so the whole server hangs until the 60 seconds are over (seen in stack dumps under
load, Prefect 3.8.8). The few writes outside of transactions still wait in SQLite, but not as long.
PostgreSQL needs none of this.
"""

import asyncio
import runpy
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import event
from sqlalchemy.pool import Pool

# Long for a transaction, which takes milliseconds, and short for a hanging server.
BUSY_MILLISECONDS = 3000
# A turn that is not given back would stop the server: after this time SQLite decides again.
TURN_SECONDS = 30.0

_queues: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


@dataclass
class _Turn:
    """The turn of a transaction; tasks that start within it see when it is over."""

    is_over: bool = False


_turn: ContextVar[_Turn | None] = ContextVar("_turn", default=None)


@event.listens_for(Pool, "checkout")
def shorten_wait(connection: Any, *_: Any) -> None:
    """Shorten a SQLite connection's timeout each time that it leaves the pool."""
    if "sqlite" in type(connection).__module__:
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {BUSY_MILLISECONDS}")
        cursor.close()


def queue_transactions() -> None:
    """Make Prefect's transactions on SQLite take turns from now on."""
    from prefect.server.database.configurations import AioSqliteConfiguration

    begin = AioSqliteConfiguration.begin_transaction

    @asynccontextmanager
    async def begin_in_turn(
        self: Any, session: Any, with_for_update: bool = False
    ) -> AsyncIterator[Any]:
        outer = _turn.get()
        if outer is not None and not outer.is_over:  # it must not wait for the one around it
            async with begin(self, session, with_for_update=with_for_update) as transaction:
                yield transaction
            return
        async with _in_turn(), begin(self, session, with_for_update=True) as transaction:
            yield transaction

    AioSqliteConfiguration.begin_transaction = begin_in_turn  # type: ignore[method-assign]


@asynccontextmanager
async def _in_turn() -> AsyncIterator[None]:
    """Wait for the turn to write, first come, first served."""
    queue = _queues.setdefault(asyncio.get_running_loop(), asyncio.Lock())
    try:
        await asyncio.wait_for(queue.acquire(), TURN_SECONDS)
    except TimeoutError:
        yield
        return
    turn = _Turn()
    token = _turn.set(turn)
    try:
        yield
    finally:
        turn.is_over = True
        _turn.reset(token)
        queue.release()


def main() -> None:
    """Run Prefect's command in this process."""
    queue_transactions()
    sys.argv[0] = "prefect"
    runpy.run_module("prefect", run_name="__main__")


if __name__ == "__main__":
    main()
