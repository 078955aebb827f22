"""The entry points of a worker: the flows, without their heavy imports.

Torch is imported after a run has started, so that Prefect shows it as running within seconds.
Names and parameters are those of the flows. The deployments name `onboard_flow`, `remerge_flow` and
`assist_flow` of this module.
"""

import logging
from typing import Any

from restitch.deployments.server.definitions import line_of_slug
from restitch.merging.errors import BadInput, RestitchError
from restitch.tasks.runtime import crash_recovery
from restitch.tasks.runtime.console import reporting_to
from restitch.tasks.runtime.engine import flow
from restitch.tasks.runtime.events import scheduled_by
from restitch.tasks.runtime.notify import notify_line
from restitch.tasks.runtime.prefect_artifacts import RunReporter
from restitch.tasks.runtime.workspace import workspace

log = logging.getLogger("restitch")
log.setLevel(logging.INFO)


@flow("onboard", "{line}/{task}/{version}")
@reporting_to(RunReporter())
def onboard(
    line: str, task: str, version: int | None = None, mlflow_version: int | None = None
) -> None:
    """Make one registered model a member of its line; see `flows.onboard`.

    Args:
        line: the line's name.
        task: the task's name.
        version: the model's version on the line.
        mlflow_version: instead, the version of a model that was registered in MLflow.
    """
    workspace()
    from restitch.flows.onboard import onboard_event

    onboard_event(line, task, version, mlflow_version)


@flow("remerge", "{line}")
@reporting_to(RunReporter())
def remerge(line: str | None = None, force: bool = False, attempt: int = 0) -> None:
    """Merge the ready models, evaluate, and promote if the gates pass; see `flows.remerge`.

    Args:
        line: the line's name; a run of a schedule that has lost its parameters has none.
        force: stitch and evaluate again although nothing changed.
        attempt: the number of earlier runs that crashed at the same work.
    """
    workspace()
    from restitch.flows.remerge import remerge as work

    line = line or line_of_slug(scheduled_by() or "")
    if not line:
        raise BadInput(
            "the run names no line",
            expected="the parameter line, or the schedule of a line that started the run",
            hint="start it with the parameter line",
        )
    work.body(line, force)


@flow("assist", "{line}")
@reporting_to(RunReporter())
def assist(line: str, offer: str) -> None:
    """Help with work that another run offers; see `flows.assist`.

    Args:
        line: the line of the work.
        offer: its identity in the store.
    """
    workspace()
    from restitch.flows.assist import assist as work

    work.body(line, offer)


def restart(flow: Any, flow_run: Any, state: Any) -> None:
    """Start a crashed run again; the worker calls this."""
    try:
        if not crash_recovery.restart(flow.name, str(flow_run.id), flow_run.parameters):
            log.warning("run %s crashed too often: %s", flow_run.name, state.message)
            _notify_of_crashes(flow_run.parameters.get("line") or "", state.message)
    except RestitchError as error:
        log.warning("run %s is left to the schedule: %s", flow_run.name, error.message())


def _notify_of_crashes(line: str, cause: str | None) -> None:
    """Notify that a line's remerge crashed too often and is left to the schedule."""
    count = crash_recovery.MAX_CRASHES
    text = (
        f"{count} runs that merged line {line} crashed in a row; the schedule tries it again.\n"
        f"The last one: {cause or 'no message'}\n"
        f"To look further: restitch status {line}, and the log of the worker"
    )
    line_state = workspace().ledger(line).state()
    notify_line(line_state, f"{line}: remerge crashed {count} times", text, ("crashes",))


def restarting(function: Any) -> Any:
    """Prefect's flow of a function, which starts again after a crash."""
    flow = function.engine_object()
    flow.on_crashed(restart)
    return flow


onboard_flow = restarting(onboard)
remerge_flow = restarting(remerge)
# Not started again after a crash: the run that offers the work does the piece itself.
assist_flow = assist.engine_object()
