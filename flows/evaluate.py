"""Evaluate a merged version that exists: every task of its members, and the benchmark."""

from dataclasses import dataclass
from typing import Any

from restitch.flows.promotion.candidates import measure_member, measure_retention
from restitch.flows.promotion.versions import find_version, members_of
from restitch.registry.ledger.records import Retention, TaskResult
from restitch.tasks.runtime.engine import flow
from restitch.tasks.runtime.refs import LineRef, WeightsRef
from restitch.tasks.runtime.workspace import workspace


@dataclass(frozen=True)
class EvaluateOutcome:
    """What a version reaches on today's data."""

    line: str
    version: int
    results: dict[str, TaskResult]
    retention: Retention | None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "line": self.line,
            "version": self.version,
            "results": {task: result.to_json() for task, result in self.results.items()},
            "retention": None if self.retention is None else self.retention.to_json(),
        }


@flow("evaluate", "{line}/{version}")
def evaluate_version(line: str, version: str = "champion") -> EvaluateOutcome:
    """Evaluate a version; what was evaluated before comes from the store.

    Raises:
        BadInput: there is no such version, or its data is gone.
    """
    ledger = workspace().ledger(line)
    line_state = ledger.state()
    record = ledger.merged(find_version(line_state, version))
    ref = LineRef(line_state.spec, line_state.base)
    merged = WeightsRef("merged", record.patch)
    return EvaluateOutcome(
        line,
        record.version,
        {m.task: measure_member(ref, m, merged) for m in members_of(line_state, record)},
        measure_retention(ref, line_state, merged),
    )
