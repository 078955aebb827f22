"""What the workers of the chaos benchmark load: the flows, which can be held at a moment.

    python -m tests.stress.chaos_entry COMMAND ...    (the `restitch` command, held likewise)

Processes that import this say where they are in files under `RESTITCH_CHAOS`, and wait at a
moment that somebody has armed, so that they can be killed there from outside. Nothing else
differs from `restitch.deployments.server.entry`; the product has no hooks.
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

MASK, ENTRY, HEAD, MLFLOW, EXPORT = "mask put", "entry put", "head swapped", "mlflow", "export"

# Longer than whoever armed the moment needs to send the signal.
HELD_SECONDS = 30.0

_folder = Path(os.environ["RESTITCH_CHAOS"])


def moment(name: str) -> None:
    """Wait to be killed if this moment is armed; one process takes it, the others go on."""
    claim = _folder / "claimed" / f"{os.getpid()}.{name}"
    with suppress(FileNotFoundError):
        (_folder / "armed" / name).rename(claim)
        released = time.monotonic() + HELD_SECONDS
        while claim.exists() and time.monotonic() < released:
            time.sleep(0.01)


@contextmanager
def inside(name: str, subject: str) -> Iterator[None]:
    """Say for the length of the context what this process is doing."""
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
        found = real(*args, **options)
        here = name(found, *args)
        if here is not None:
            moment(here)
        return found

    setattr(owner, method, call)


def _before(owner: Any, method: str, name: str) -> None:
    real = getattr(owner, method)

    def call(*args: Any, **options: Any) -> Any:
        moment(name)
        return real(*args, **options)

    setattr(owner, method, call)


_after(ObjectStore, "publish", lambda _, __, kind, *___: MASK if kind == "mask" else None)
_after(FolderStore, "put", lambda _, __, name, *___: ENTRY if name.startswith("audit/") else None)
_after(FolderStore, "swap", lambda tag, _, name, *__: HEAD if tag and "head.json" in name else None)
_before(Writer, "write_artifacts", MLFLOW)  # its run is made and not yet complete


@flow("onboard", "{line}/{task}/{version}")
def onboard(
    line: str, task: str, version: int | None = None, mlflow_version: int | None = None
) -> None:
    """`restitch.deployments.server.entry.onboard`, seen from outside."""
    with inside("onboard", task):
        entry.onboard.body(line, task, version, mlflow_version)


@flow("remerge", "{line}")
def remerge(line: str, force: bool = False, attempt: int = 0) -> None:
    """`restitch.deployments.server.entry.remerge`, seen from outside."""
    with inside("remerge", line):
        entry.remerge.body(line, force, attempt)


onboard_flow = entry.restarting(onboard)
remerge_flow = entry.restarting(remerge)


def main() -> None:
    """Run the command, held where it writes an export."""
    import sys

    from restitch.cli.main import main as command

    _before(export_module, "_write_heads", EXPORT)  # the weights are there, the rest is not
    with inside(sys.argv[1], sys.argv[2]):
        command()


if __name__ == "__main__":
    main()
