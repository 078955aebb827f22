"""The stack that `restitch up` started for a home: `stack.json` with addresses and processes.

Files are replaced atomically. A process is identified by its id and start time, because ids are
reused. After `restitch down` the file keeps only the ports. Addresses of databases hold
passwords, so they lie in a folder that only its owner can read.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Self

from pydantic import BaseModel

from restitch.merging.errors import Damage, Unavailable

FILE = "stack.json"
SECRETS = "secrets"  # the folder of a home that only its owner can read
_DATABASES = "databases.json"


class StackProcess(BaseModel, frozen=True):
    """One process of the stack.

    Attributes:
        began: its start time, in seconds since the epoch.
        port: the port that it listens on, if any.
        log: its log file.
        serves: digest of the command and the settings that it was started with.
    """

    pid: int
    began: float
    port: int | None = None
    log: str
    serves: str


class StackFile(BaseModel, frozen=True):
    """The stack of a home.

    Attributes:
        prefect_api_url: the API of its Prefect server; None while it is down.
        mlflow_uri: the address of its MLflow server; None while it is down.
        webhook_url: the address of its receiver of MLflow's webhooks; None while it is down.
        ports: the last ports by process, so that addresses stay the same.
        processes: the running processes by name.
    """

    prefect_api_url: str | None = None
    mlflow_uri: str | None = None
    webhook_url: str | None = None
    ports: dict[str, int] = {}
    processes: dict[str, StackProcess] = {}

    @classmethod
    def read(cls, root: Path) -> Self:
        """The stack of a home; a missing or unreadable file means that nothing is running."""
        try:
            return cls.model_validate_json((root / FILE).read_bytes())
        except (OSError, ValueError):
            return cls()

    def write(self, root: Path) -> None:
        """Replace the file."""
        root.mkdir(parents=True, exist_ok=True)
        _replace(root / FILE, self)


class Databases(BaseModel, frozen=True):
    """The databases of a home's servers; None means SQLite in the home."""

    prefect: str | None = None
    mlflow: str | None = None

    @classmethod
    def read(cls, root: Path) -> Self:
        """The databases that were last used.

        Raises:
            Damage: the file has another content.
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
                hint="run the command as the user who ran `restitch up` in this home",
            ) from None
        except ValueError:
            # Without it a new database would be created although there is one.
            raise Damage(
                f"{path} cannot be read",
                expected="the addresses of the databases that `restitch up` was started with",
                hint="remove it, and pass the addresses to `restitch up` again",
            ) from None

    def write(self, root: Path) -> None:
        """Replace the file, readable only by its owner."""
        folder = root / SECRETS
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _replace(folder / _DATABASES, self)


def _replace(path: Path, content: BaseModel) -> None:
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(content.model_dump(mode="json"), file, indent=1)
    Path(name).replace(path)
