"""Accuracy of Consensus against the number of tasks that must agree on a weight.

Consensus runs with task arithmetic and with TIES. The coefficient is tuned for each number, if
all tasks have validation rows. Zero requires no agreement: the whole sum is merged.
"""

from typing import Any

from restitch.flows.research.study.subject import NOT_TUNED, Study, Subject
from restitch.merging.methods.registry import Method, get_method
from restitch.tasks.report.study_plots import Axes, lines_plot
from restitch.tasks.runtime.console import say

CONSENSUS = ("consensus-ta", "consensus-ties")
# With threshold 0 a mask keeps every weight, so that one task always agrees.
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
    plot = lines_plot("threshold", "Consensus by the number of tasks that must agree", rows, axes)
    return Study(rows, [plot], [] if subject.can_tune else [NOT_TUNED])


def _row(subject: Subject, method: Method, agreement: int) -> dict[str, Any]:
    say(f"{subject.line.spec.line}: {method.name}, {agreement} must agree")
    settings = {"agreement": agreement} if agreement else _NONE
    what_if = subject.prepare(method, subject.members, settings=settings, tuned=True)
    reached = subject.reached(what_if)
    return {
        "method": method.name,
        "agreement": agreement,
        "alpha": what_if.line.spec.method.settings["alpha"],
        "changed": reached.patch.kept,
        **reached.values(),
    }
