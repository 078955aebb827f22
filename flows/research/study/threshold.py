"""Consensus by how many tasks must agree on a weight, with task arithmetic and with TIES.

The coefficient is chosen again for each on validation rows, where all tasks have them. Zero asks
for no agreement: the sum itself, every weight of it.
"""

from typing import Any

from restitch.flows.research.study.subject import Study, Subject
from restitch.merging.methods.registry import Method, get_method
from restitch.tasks.report.study_plots import Axes, lines_plot
from restitch.tasks.runtime.console import say

CONSENSUS = ("consensus-ta", "consensus-ties")
# Every weight is in a mask of threshold 0, so that one task always agrees.
_NONE = {"agreement": 1, "threshold": 0.0}


def make(subject: Subject) -> Study:
    """The study."""
    rows = [
        _row(subject, get_method(name), agreement)
        for name in CONSENSUS
        for agreement in range(len(subject.members) + 1)
    ]
    axes = Axes(
        ("agreement", "tasks that must agree (k)"),
        ("normalized", "normalized accuracy, merged"),
        "method",
        whole=True,
    )
    plot = lines_plot("threshold", "Consensus by the agreement that it asks for", rows, axes)
    notes = (
        []
        if subject.can_tune
        else ["coefficients are the defaults: not every task has validation rows"]
    )
    return Study(rows, [plot], notes)


def _row(subject: Subject, method: Method, agreement: int) -> dict[str, Any]:
    say(f"{subject.line.spec.line}: {method.name}, {agreement} must agree")
    settings = {"agreement": agreement} if agreement else _NONE
    trial = subject.prepare(method, subject.members, settings=settings, tuned=True)
    reached = subject.reached(trial)
    return {
        "method": method.name,
        "agreement": agreement,
        "alpha": trial.line.spec.method.settings["alpha"],
        "changed": reached.patch.kept,
        **reached.values(),
    }
