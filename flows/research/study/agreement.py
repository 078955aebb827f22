"""The share of the weights that lies in exactly n masks.

Weights in no mask are catastrophic, in one selfish, in two or more general, in all universal. The
masks are the TALL masks of every task, made from the sum of the task vectors and from that of
TIES, and the line's own masks if its method merges sparse deltas.
"""

from typing import Any

from restitch.flows.research.study.subject import Study, Subject
from restitch.merging.methods.registry import get_method
from restitch.tasks.report.study_plots import Axes, bars_plot
from restitch.tasks.research.agreement import TOGETHER, agreement

THRESHOLD = 0.4
WHOLE = "averaging"


def make(subject: Subject) -> Study:
    """The study."""
    dense = subject.prepare(get_method(WHOLE), subject.members)
    deltas = tuple(str(m.model.delta) for m in dense.members)
    counts = {
        f"TALL {name}": agreement(subject.line, deltas, together, THRESHOLD)
        for name, together in TOGETHER.items()
    }
    if not subject.method.whole:
        own = subject.prepare(subject.method, subject.members)
        sparse = tuple(str(m.model.delta) for m in own.members)
        counts["the line's masks"] = agreement(subject.line, sparse, None, 0.0)
    rows = [
        {
            "masks": name,
            "agreeing": number,
            "kind": _kind(number, len(deltas)),
            "weights": count,
            "share": count / sum(by_number),
        }
        for name, by_number in counts.items()
        for number, count in enumerate(by_number)
    ]
    axes = Axes(("share", "share of the localizable weights"), ("kind", ""), "masks", percent=True)
    plot = bars_plot("agreement", "Weights by the number of masks that keep them", rows, axes)
    notes = [f"{name}: {_shares(rows, name, len(deltas))}" for name in counts]
    return Study(rows, [plot], notes)


def _kind(number: int, tasks: int) -> str:
    kinds = {0: "catastrophic (0)", 1: "selfish (1)", tasks: f"universal ({tasks})"}
    return kinds.get(number, f"general ({number})")


def _shares(rows: list[dict[str, Any]], name: str, tasks: int) -> str:
    shares = [row["share"] for row in rows if row["masks"] == name]
    general = sum(shares[2:])
    return (
        f"catastrophic {shares[0]:.1%}, selfish {shares[1]:.1%}, general {general:.1%}, "
        f"including universal {shares[tasks]:.1%}"
    )
