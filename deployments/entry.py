"""What a worker loads: the flows, without what they need.

Torch and the models are imported when a run has begun, not before: a run is shown as running
within seconds. The names and parameters are those of the flows; a deployment's entrypoint is
`deployments.entry.onboard_flow` or `deployments.entry.remerge_flow`.
"""

import logging

from tasks.engine import flow
from tasks.workspace import workspace

logging.getLogger("restitch").setLevel(logging.INFO)


@flow("onboard", "{line}/{task}/{version}")
def onboard(
    line: str, task: str, version: int | None = None, mlflow_version: int | None = None
) -> None:
    """Make one registered model a member of its line; see `flows.onboard`.

    Args:
        line: the line's name.
        task: the task's name.
        version: the model's number on the line.
        mlflow_version: in place of it, the number of a model that was registered in MLflow.
    """
    workspace()
    from flows.onboard import onboard_event

    onboard_event(line, task, version, mlflow_version)


@flow("remerge", "{line}")
def remerge(line: str, force: bool = False, attempt: int = 0) -> None:
    """Merge what is ready, evaluate it, promote it if its gates pass; see `flows.remerge`.

    Args:
        line: the line's name.
        force: stitch and evaluate anew although nothing changed.
        attempt: how many runs before this one died at the same work.
    """
    workspace()
    from flows.remerge import remerge as work

    work.body(line, force, attempt)  # type: ignore[attr-defined]


onboard_flow = onboard.engine_object()  # type: ignore[attr-defined]
remerge_flow = remerge.engine_object()  # type: ignore[attr-defined]
