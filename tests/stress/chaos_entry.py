"""The flows for the workers of `chaos`, which can be stopped at a moment.

    python -m tests.stress.chaos_entry COMMAND ...    (the `restitch` command, in the same way)

Processes that import this record their state in files under `RESTITCH_CHAOS`, and wait at an armed
moment, so that `chaos` can kill them there. Nothing else differs from
`restitch.deployments.server.entry`; the product has no hooks.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from restitch.deployments.server import entry
from restitch.flows import export as export_module
from restitch.registry.mlflow.writer import Writer
from restitch.registry.store.folder import FolderStore
from restitch.registry.store.objects import ObjectStore
from restitch.tasks.runtime.engine import flow

MASK, ENTRY, STATE, MLFLOW, EXPORT = "mask put", "entry put", "state swapped", "mlflow", "export"

# Longer than `chaos` needs to send the signal.
HELD_SECONDS = 30.0

_folder = Path(os.environ["RESTITCH_CHAOS"])


def moment(name: str) -> None:
    """Wait to be killed if this moment is armed; one process waits, the others continue."""
    claim = _folder / "claimed" / f"{os.getpid()}.{name}"
    with suppress(FileNotFoundError):
        (_folder / "armed" / name).rename(claim)
        released = time.monotonic() + HELD_SECONDS
        while claim.exists() and time.monotonic() < released:
            time.sleep(0.01)


@contextmanager
def inside(name: str, subject: str) -> Iterator[None]:
    """Record within the context what this process is doing."""
    marker = _folder / "inside" / str(os.getpid())
    temporary = marker.with_name(f".{marker.name}")
    temporary.write_text(json.dumps({"doing": name, "subject": subject}))
    temporary.replace(marker)
    try:
        yield
    finally:
        marker.unlink(missing_ok=True)


def _after(owner: Any, method: str, name: Callable[..., str | None]) -> None:
    real = getattr(owner, method)

    def call(*args: Any, **options: Any) -> Any:
        result = real(*args, **options)
        here = name(result, *args)
        if here is not None:
            moment(here)
        return result

    setattr(owner, method, call)


def _before(owner: Any, method: str, name: str) -> None:
    real = getattr(owner, method)

    def call(*args: Any, **options: Any) -> Any:
        moment(name)
        return real(*args, **options)

    setattr(owner, method, call)


_after(ObjectStore, "publish", lambda _, __, kind, *___: MASK if kind == "mask" else None)
_after(FolderStore, "put", lambda _, __, name, *___: ENTRY if name.startswith("audit/") else None)
_after(
    FolderStore, "swap", lambda tag, _, name, *__: STATE if tag and "head.json" in name else None
)
_before(Writer, "write_artifacts", MLFLOW)  # its run exists and is not complete


@flow("onboard", "{line}/{task}/{version}")
def onboard(
    line: str, task: str, version: int | None = None, mlflow_version: int | None = None
) -> None:
    """Run `restitch.deployments.server.entry.onboard`, and record it."""
    with inside("onboard", task):
        entry.onboard.body(line, task, version, mlflow_version)


@flow("remerge", "{line}")
def remerge(line: str, force: bool = False, attempt: int = 0) -> None:
    """Run `restitch.deployments.server.entry.remerge`, and record it."""
    with inside("remerge", line):
        entry.remerge.body(line, force, attempt)


onboard_flow = entry.restarting(onboard)
remerge_flow = entry.restarting(remerge)


def main() -> None:
    """Run the command, with a moment in the middle of an export."""
    import sys

    from restitch.cli.main import main as command

    _before(export_module, "_write_heads", EXPORT)  # after the weights, before the rest
    with inside(sys.argv[1], sys.argv[2]):
        command()


if __name__ == "__main__":
    main()
