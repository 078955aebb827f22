"""Access for steps to the store, the ledgers of lines, MLflow, and the identity of the actor.

`RESTITCH_HOME`, which the command line and the workers set, determines all of it. A `Workspace`
has no state of its own; it is opened when it is first used.
"""

import getpass
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from pydantic import JsonValue

from restitch.merging.errors import BadInput
from restitch.registry.home import Home, prepare_environment
from restitch.registry.ledger.ledger import Ledger, check_not_dropped, lines_in_use
from restitch.registry.mlflow.sync import MlflowProjection
from restitch.registry.store.disk import explained
from restitch.registry.store.objects import ObjectStore
from restitch.tasks.runtime.events import workers_flow

T = TypeVar("T")


@dataclass(frozen=True)
class Workspace:
    """An opened `RESTITCH_HOME`."""

    home: Home

    @cached_property
    def objects(self) -> ObjectStore:
        """The content-addressed store."""
        return ObjectStore(self.home.open_store())

    @cached_property
    def mlflow(self) -> MlflowProjection:
        """The client of MLflow."""
        return MlflowProjection(self.home)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A temporary folder, removed when the context closes.

        Raises:
            Unavailable: there is no space or no permission.
        """
        parent = self.home.scratch
        with explained(parent, "write"), TemporaryDirectory(dir=parent) as folder:
            yield Path(folder)

    def stored(self, kind: str, key: str) -> Any:
        """The JSON value that is stored under a key, or None."""
        record = self.objects.lookup(kind, key)
        return None if record is None else json.loads(self.objects.read_blob(record.blob))

    def keep(self, kind: str, key: str, value: T) -> T:
        """Store a JSON value; return the stored one, which another worker may have made."""
        record = self.objects.publish(kind, key, self.objects.put_json(value), made_by())
        stored: T = json.loads(self.objects.read_blob(record.blob))
        return stored

    def ledger(self, line: str, *, dropped: bool = False) -> Ledger:
        """The state and the audit trail of a line.

        Args:
            line: the line's name.
            dropped: also take a line that was dropped, to read what it was.

        Raises:
            BadInput: there is no such line, or it was dropped.
        """
        ledger = Ledger(self.objects, line)
        line_state = ledger.find()
        if line_state is None:
            known = ", ".join(each.line for each in lines_in_use(self.objects)) or "none"
            raise BadInput(
                f"there is no line {line!r}",
                expected="a line created by `restitch init`",
                found=f"lines: {known} (in {self.home.root})",
                hint="create it with `restitch init FILE`, or set RESTITCH_HOME",
            )
        if not dropped:
            check_not_dropped(line_state)
        return ledger


def workspace(*, to_write: bool = True) -> Workspace:
    """The workspace that the environment names.

    Without `to_write`, no folder is created and the home may be read-only.
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
    """The identity for the audit trail.

    In a run of a worker it is the flow with its host, such as `remerge@gpu-3`: nobody decided what
    it does. A command acts for a person: `RESTITCH_ACTOR`, or the system's user.
    """
    flow = workers_flow()
    if flow is not None:
        return f"{flow}@{socket.gethostname()}"
    return os.environ.get("RESTITCH_ACTOR") or getpass.getuser()


def made_by() -> dict[str, JsonValue]:
    """The process that makes something: for records, never for keys."""
    of_worker = {"worker": "RESTITCH_WORKER", "work_pool": "RESTITCH_WORK_POOL"}
    return {
        "actor": actor(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        **{key: os.environ[name] for key, name in of_worker.items() if os.environ.get(name)},
    }
