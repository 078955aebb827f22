"""Write a line's state to MLflow: the last step of every change to the line."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from restitch.merging.errors import RestitchError, Unavailable
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.mlflow.sync import Extras
from restitch.registry.store.disk import explained
from restitch.tasks.runtime.console import warn, working
from restitch.tasks.runtime.engine import step
from restitch.tasks.runtime.workspace import Workspace, workspace

if TYPE_CHECKING:
    from restitch.serving.served_version import ServedVersion

# After a server failed this slowly, this process does not try it again for a while.
SLOW_SECONDS, PAUSE_SECONDS = 5.0, 120.0
_paused_until: dict[str, float] = {}


@step("log")
def mirror(line: str, extras: Extras | None = None, *, again: bool = False) -> bool:
    """Write everything to MLflow that is missing there.

    The store holds the truth, so a server that cannot be reached only causes a warning, and the
    next remerge completes MLflow.

    Args:
        line: the line's name.
        extras: makes additional artifacts of a merged version, by path.
        again: write everything again, also what is there.

    Returns:
        Whether MLflow is complete.
    """
    space = workspace()
    address, started = space.home.mlflow_uri, time.monotonic()
    if started < _paused_until.get(address, 0.0):
        return False
    try:
        ledger = space.ledger(line, dropped=True)
        models = MergedModels(ledger, space)
        space.mlflow.repair(ledger, full=again, extras=extras, models=models)
    except Unavailable as error:
        now = time.monotonic()
        if now - started > SLOW_SECONDS:
            _paused_until[address] = now + PAUSE_SECONDS
        warn(f"MLflow is incomplete until the next remerge: {error.message()}")
        return False
    return True


class MergedModels:
    """Makes the MLflow models of a line's merged versions; failures only cause warnings."""

    def __init__(self, ledger: Ledger, space: Workspace) -> None:
        self.ledger = ledger
        self.space = space

    def files(self, version: int, *, weights: bool) -> Mapping[str, bytes]:
        """The small files of a version; no files if they cannot be made now."""
        from restitch.serving.mlflow_model import model_files

        try:
            return model_files(self._served(version), weights=weights)
        except RestitchError as error:
            warn(f"version {version} is no MLflow model until it can be read: {error.message()}")
            return {}

    @contextmanager
    def weights(self, version: int) -> Iterator[Path | None]:
        """A folder with the weights of a version; None if they cannot be made now."""
        from restitch.serving.mlflow_model import write_weights

        with self.space.scratch() as folder:
            made: Path | None = folder
            try:
                title = f"writing the weights of version {version} for MLflow"
                with explained(folder, "write"), working(title) as progress:
                    write_weights(self._served(version), folder, progress)
            except RestitchError as error:
                self.failed(version, error.message())
                made = None
            yield made

    def failed(self, version: int, reason: str) -> None:
        """Report weights that could not be written or removed."""
        warn(
            f"the weights of version {version} in MLflow are not up to date until the next"
            f" remerge: {reason}"
        )

    def _served(self, version: int) -> "ServedVersion":
        from restitch.serving.served_version import served_version

        return served_version(self.space.home, self.ledger.state(), self.ledger.merged(version))
