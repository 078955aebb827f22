"""Complete MLflow's image of a line: the last step of whatever changed the line."""

from merging.errors import Unavailable
from tasks.engine import step
from tasks.reporting import warn
from tasks.workspace import workspace


@step("log")
def mirror(line: str) -> bool:
    """Write to MLflow what is missing there.

    The store already holds the truth, so a server that is away stops nothing: it is said, and
    the next remerge completes the image.

    Returns:
        Whether the image is complete.
    """
    space = workspace()
    try:
        space.catalog.repair(space.ledger(line))
    except Unavailable as error:
        warn(f"MLflow is behind and will be completed by the next remerge: {error.message()}")
        return False
    return True
