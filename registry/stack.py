"""What `restitch up` started for a home: `stack.json`, the addresses and the processes.

A file is written whole or not at all. A process is known by its id together with the
time at which it began, so that another one with the same id is never taken for it. The
addresses count while the file says that the stack is up; after `restitch down` the ports
are remembered and nothing else. Addresses of databases hold passwords: they lie with the home's
secrets, which only their owner can read.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from restitch.merging.errors import Damage, Unavailable

FILE = "stack.json"
SECRETS = "secrets"  # the folder of a home that nobody else can read
_DATABASES = "databases.json"


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
        _replace(root / FILE, self)


class Databases(BaseModel):
    """The databases of a home's servers; None is SQLite in the home."""

    model_config = ConfigDict(frozen=True)

    prefect: str | None = None
    mlflow: str | None = None

    @classmethod
    def read(cls, root: Path) -> Self:
        """What was last used.

        Raises:
            Damage: the file is not what was written.
            Unavailable: this user may not read it.
        """
        path = root / SECRETS / _DATABASES
        try:
            return cls.model_validate_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return cls()
        except OSError as error:
            raise Unavailable(
                f"cannot read {path}",
                found=error.strerror,
                hint="work as the user who ran `restitch up` in this home",
            ) from None
        except ValueError:
            # Without it another database would be begun beside the one that is in use.
            raise Damage(
                f"{path} cannot be read",
                expected="the addresses of the databases that `restitch up` was started with",
                hint="remove it, and give them to `restitch up` once more: docs/operations.md",
            ) from None

    def write(self, root: Path) -> None:
        """Replace the file, readable by its owner only."""
        folder = root / SECRETS
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _replace(folder / _DATABASES, self)


def _replace(path: Path, content: BaseModel) -> None:
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(content.model_dump(mode="json"), file, indent=1)
    Path(name).replace(path)
