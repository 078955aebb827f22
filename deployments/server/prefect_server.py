"""Prefect's server on SQLite, which does not stand still for a minute.

    python -m restitch.deployments.server.prefect_server server start ...    (as `python -m prefect ...`)

Prefect lets a connection wait 60 seconds for a lock. Now and then the interpreter collects a
cursor of such a connection in the thread of the event loop, where that waits for the
connection; whoever holds the lock then needs that very thread to commit, and the whole server
stands still until the 60 seconds are over (seen in stack dumps under load, Prefect 3.8.8). The
only difference made here is a shorter wait. Who comes in vain is answered with 503, and
clients ask again. With PostgreSQL there is nothing to mend, and no need for this module.
"""

import runpy
import sys
from typing import Any

from sqlalchemy import event
from sqlalchemy.pool import Pool

# Long for a transaction, which takes milliseconds, and short for a server that stands still.
BUSY_MILLISECONDS = 3000


@event.listens_for(Pool, "checkout")
def wait_less(connection: Any, *_: Any) -> None:
    """Shorten a SQLite connection's patience each time that it is used anew."""
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
