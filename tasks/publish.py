"""Complete MLflow's image of a line: the last step of whatever changed the line."""

import time

from restitch.merging.errors import Unavailable
from restitch.registry.mlflow.sync import Extras
from restitch.tasks.runtime.console import warn
from restitch.tasks.runtime.engine import step
from restitch.tasks.runtime.workspace import workspace

# A server that kept us waiting in vain is not asked again for a while by this process.
PATIENCE, PAUSE = 5.0, 120.0
_away_until: dict[str, float] = {}


@step("log")
def mirror(line: str, extras: Extras | None = None) -> bool:
    """Write to MLflow what is missing there.

    The store already holds the truth, so a server that is away stops nothing: it is said, and
    the next remerge completes the image.

    Args:
        line: the line's name.
        extras: further artifacts of a merged version, by path.

    Returns:
        Whether the image is complete.
    """
    space = workspace()
    address, started = space.home.mlflow_uri, time.monotonic()
    if started < _away_until.get(address, 0.0):
        return False
    try:
        space.catalog.repair(space.ledger(line), extras=extras)
    except Unavailable as error:
        now = time.monotonic()
        if now - started > PATIENCE:
            _away_until[address] = now + PAUSE
        warn(f"MLflow is behind and will be completed by the next remerge: {error.message()}")
        return False
    return True
