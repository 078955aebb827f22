"""What `restitch up` started for a home: `stack.json`, the addresses and the processes.

The file is written whole or not at all. A process is known by its id together with the
time at which it began, so that another one with the same id is never taken for it. The
addresses count while the file says that the stack is up; after `restitch down` the ports
are remembered and nothing else.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

FILE = "stack.json"


class StackProcess(BaseModel):
    """One process of the stack.

    Attributes:
        began: when it began, in seconds since the epoch.
        port: where it listens, if it does.
        log: its log file.
        serves: digest of the command and the settings that it was started with.
    """

    model_config = ConfigDict(frozen=True)

    pid: int
    began: float
    port: int | None = None
    log: str
    serves: str


class StackFile(BaseModel):
    """The stack of a home.

    Attributes:
        prefect_api_url: the API of its Prefect server; None while it is down.
        mlflow_uri: the address of its MLflow server; None while it is down.
        webhook_url: where its receiver takes MLflow's webhooks; None while it is down.
        ports: what was last used, by process, so that addresses stay the same.
        processes: what runs, by name.
    """

    model_config = ConfigDict(frozen=True)

    prefect_api_url: str | None = None
    mlflow_uri: str | None = None
    webhook_url: str | None = None
    ports: dict[str, int] = {}
    processes: dict[str, StackProcess] = {}

    @classmethod
    def read(cls, root: Path) -> Self:
        """The stack of a home; an absent or broken file means that nothing is up."""
        try:
            return cls.model_validate(json.loads((root / FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, ValidationError):
            return cls()

    def write(self, root: Path) -> None:
        """Replace the file."""
        root.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{FILE}-", dir=root)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(self.model_dump(mode="json"), file, indent=1)
        Path(name).replace(root / FILE)
