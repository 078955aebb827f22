"""Run Prefect's server on SQLite so that it never hangs for a minute.

    python -m restitch.deployments.server.prefect_server server start ...

The arguments are those of `python -m prefect`. Prefect lets a connection wait 60 seconds for a
lock. Sometimes Python's garbage collector closes a cursor of such a connection in the thread of
the event loop and waits there for the connection; the holder of the lock needs that thread to
commit, so the whole server hangs until the 60 seconds are over (seen in stack dumps under load,
Prefect 3.8.8). This module only shortens the wait: the server then answers 503, and clients try
again. PostgreSQL does not need it.
"""

import runpy
import sys
from typing import Any

from sqlalchemy import event
from sqlalchemy.pool import Pool

# Long for a transaction, which takes milliseconds, and short for a hanging server.
BUSY_MILLISECONDS = 3000


@event.listens_for(Pool, "checkout")
def shorten_wait(connection: Any, *_: Any) -> None:
    """Shorten a SQLite connection's timeout each time that it leaves the pool."""
    if "sqlite" in type(connection).__module__:
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {BUSY_MILLISECONDS}")
        cursor.close()


def main() -> None:
    """Run Prefect's command in this process."""
    sys.argv[0] = "prefect"
    runpy.run_module("prefect", run_name="__main__")


if __name__ == "__main__":
    main()
