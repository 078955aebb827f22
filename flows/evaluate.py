"""Evaluate an existing merged version on the tasks of its members and on the benchmark."""

from dataclasses import dataclass

from restitch.flows.outcome import Outcome
from restitch.flows.promotion.candidates import measure, with_reasons
from restitch.flows.promotion.snapshot import retention_task
from restitch.flows.promotion.versions import members_of, open_version
from restitch.modeling.families.family import get_family
from restitch.registry.ledger.records import Retention, TaskResult
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.inputs.task_data import evaluation_split, verified_data
from restitch.tasks.runtime.engine import flow
from restitch.tasks.runtime.refs import LineRef, WeightsRef


@dataclass(frozen=True)
class EvaluateOutcome(Outcome):
    """The measurements of a version on the tasks' data as it is now."""

    line: str
    version: int
    results: dict[str, TaskResult]
    retention: Retention | None


@flow("evaluate", "{line}/{version}")
def evaluate_version(line: str, version: str = "champion") -> EvaluateOutcome:
    """Evaluate a version; earlier results come from the store.

    Raises:
        BadInput: there is no such version, or its data has changed or is gone.
    """
    _, line_state, record = open_version(line, version)
    ref = LineRef(line_state.spec, line_state.base)
    merged = WeightsRef("merged", record.patch)
    members, benchmark = members_of(line_state, record), retention_task(line_state)
    _check_data([m.spec for m in members] + ([] if benchmark is None else [benchmark]), ref)
    results, retention = measure(ref, line_state, members, merged)
    return EvaluateOutcome(line, record.version, with_reasons(ref, members, results), retention)


def _check_data(specs: list[TaskSpec], line: LineRef) -> None:
    """Refuse data that changed: results in the store are of the data that was registered.

    Raises:
        BadInput: a file is missing or has changed.
    """
    family = get_family(line.spec.family)
    for spec in specs:
        if evaluation_split(spec) is not None:
            verified_data(spec, family)
