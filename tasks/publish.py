"""Write a line's state to MLflow: the last step of every change to the line."""

import time

from restitch.merging.errors import Unavailable
from restitch.registry.mlflow.sync import Extras
from restitch.tasks.runtime.console import warn
from restitch.tasks.runtime.engine import step
from restitch.tasks.runtime.workspace import workspace

# After a server failed this slowly, this process does not try it again for a while.
SLOW_SECONDS, PAUSE_SECONDS = 5.0, 120.0
_paused_until: dict[str, float] = {}


@step("log")
def mirror(line: str, extras: Extras | None = None) -> bool:
    """Write everything to MLflow that is missing there.

    The store holds the truth, so a server that cannot be reached only causes a warning, and the
    next remerge completes MLflow. `extras` makes additional artifacts of a merged version, by path.

    Returns:
        Whether MLflow is complete.
    """
    space = workspace()
    address, started = space.home.mlflow_uri, time.monotonic()
    if started < _paused_until.get(address, 0.0):
        return False
    try:
        space.mlflow.repair(space.ledger(line, dropped=True), extras=extras)
    except Unavailable as error:
        now = time.monotonic()
        if now - started > SLOW_SECONDS:
            _paused_until[address] = now + PAUSE_SECONDS
        warn(f"MLflow is incomplete until the next remerge: {error.message()}")
        return False
    return True
