"""What a worker loads: the flows, without what they need.

Torch and the models are imported when a run has begun, not before: a run is shown as running
within seconds. The names and parameters are those of the flows; a deployment's entrypoint is
`restitch.deployments.server.entry.onboard_flow` or `restitch.deployments.server.entry.remerge_flow`.
"""

import logging
from typing import Any

from restitch.merging.errors import Unavailable
from restitch.tasks.runtime.console import reporting_to
from restitch.tasks.runtime.crash_recovery import restart
from restitch.tasks.runtime.engine import flow
from restitch.tasks.runtime.prefect_artifacts import RunReporter
from restitch.tasks.runtime.workspace import workspace

log = logging.getLogger("restitch")
log.setLevel(logging.INFO)


@flow("onboard", "{line}/{task}/{version}")
@reporting_to(RunReporter())
def onboard(
    line: str, task: str, version: int | None = None, mlflow_version: int | None = None
) -> None:
    """Make one registered model a member of its line; see `restitch.flows.onboard`.

    Args:
        line: the line's name.
        task: the task's name.
        version: the model's number on the line.
        mlflow_version: in place of it, the number of a model that was registered in MLflow.
    """
    workspace()
    from restitch.flows.onboard import onboard_event

    onboard_event(line, task, version, mlflow_version)


@flow("remerge", "{line}")
@reporting_to(RunReporter())
def remerge(line: str, force: bool = False, attempt: int = 0) -> None:
    """Merge what is ready, evaluate it, promote it if its gates pass; see `restitch.flows.remerge`.

    Args:
        line: the line's name.
        force: stitch and evaluate anew although nothing changed.
        attempt: how many runs before this one died at the same work.
    """
    workspace()
    from restitch.flows.remerge import remerge as work

    work.body(line, force)


def begin_again(flow: Any, flow_run: Any, state: Any) -> None:
    """What a worker calls when a run of its own has crashed."""
    try:
        if not restart(flow.name, str(flow_run.id), flow_run.parameters):
            log.warning("run %s crashed too often: %s", flow_run.name, state.message)
    except Unavailable as error:
        log.warning("run %s is left to the schedule: %s", flow_run.name, error.message())


def watched(function: Any) -> Any:
    """A flow as Prefect has it, which is started again when it crashes."""
    found = function.engine_object()
    found.on_crashed(begin_again)
    return found


onboard_flow = watched(onboard)
remerge_flow = watched(remerge)
