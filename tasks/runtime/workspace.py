"""Where steps find things: the store, a line's ledger, the catalog, and who acts.

Everything hangs on `RESTITCH_HOME`, which the command line and the workers set. A
`Workspace` holds no state of its own; opening one costs nothing.
"""

import getpass
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import JsonValue

from restitch.merging.errors import BadInput
from restitch.registry.home import Home, prepare_environment
from restitch.registry.ledger.ledger import Ledger, lines
from restitch.registry.mlflow.sync import Catalog
from restitch.registry.store.disk import explained
from restitch.registry.store.objects import ObjectStore


@dataclass(frozen=True)
class Workspace:
    """One installation, opened."""

    home: Home

    @cached_property
    def objects(self) -> ObjectStore:
        """The content-addressed store."""
        return ObjectStore(self.home.open_store())

    @cached_property
    def catalog(self) -> Catalog:
        """The owner of MLflow."""
        return Catalog(self.home)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for files that are being made; it is gone afterwards.

        Raises:
            Unavailable: no space, no permission.
        """
        place = self.home.scratch
        with explained(place, "write"), TemporaryDirectory(dir=place) as folder:
            yield Path(folder)

    def ledger(self, line: str) -> Ledger:
        """The head and the audit trail of a line.

        Raises:
            BadInput: there is no such line; the message lists those that there are.
        """
        ledger = Ledger(self.objects, line)
        if not ledger.exists():
            known = ", ".join(lines(self.objects)) or "none"
            raise BadInput(
                f"there is no line {line!r}",
                expected="a line made by `restitch init`",
                found=f"lines: {known} (in {self.home.root})",
                hint="make it with `restitch init FILE`, or set RESTITCH_HOME",
            )
        return ledger


def workspace(*, to_write: bool = True) -> Workspace:
    """The workspace that the environment names.

    Args:
        to_write: make its folders; who only looks leaves no trace, and may look at a
            home that is read-only.
    """
    home = Home.from_environment()
    prepare_environment(home)
    if to_write:
        home.create()
    return _opened(home)


@lru_cache(maxsize=8)
def _opened(home: Home) -> Workspace:
    return Workspace(home)


def actor() -> str:
    """Who acts: the identity that the deployment gives, or the user of the system."""
    return os.environ.get("RESTITCH_ACTOR") or getpass.getuser()


def made_by() -> dict[str, JsonValue]:
    """Which process made something: for the record, never for a key."""
    of_worker = {"worker": "RESTITCH_WORKER", "work_pool": "RESTITCH_WORK_POOL"}
    return {
        "actor": actor(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        **{key: os.environ[name] for key, name in of_worker.items() if os.environ.get(name)},
    }
