"""Which share of the weights is in exactly n masks: none (catastrophic), one (selfish), two or
more (general), all (universal).

TALL masks of every task, on the sum of the task vectors and on that of TIES; and the masks of the
line, where it keeps some weights of a member and not all.
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
    whole = subject.prepare(get_method(WHOLE), subject.members)
    deltas = tuple(str(m.model.delta) for m in whole.members)
    counts = {
        f"TALL {name}": agreement(subject.line, deltas, together, THRESHOLD)
        for name, together in TOGETHER.items()
    }
    if not subject.method.whole:
        own = subject.prepare(subject.method, subject.members)
        kept = tuple(str(m.model.delta) for m in own.members)
        counts["the line's masks"] = agreement(subject.line, kept, None, 0.0)
    rows = [
        {
            "masks": name,
            "agreeing": number,
            "kind": _kind(number, len(deltas)),
            "weights": count,
            "share": count / sum(found),
        }
        for name, found in counts.items()
        for number, count in enumerate(found)
    ]
    axes = Axes(("share", "share of the localizable weights"), ("kind", ""), "masks", percent=True)
    plot = bars_plot("agreement", "Weights by how many masks keep them", rows, axes)
    notes = [f"{name}: {_told(rows, name, len(deltas))}" for name in counts]
    return Study(rows, [plot], notes)


def _kind(number: int, tasks: int) -> str:
    kinds = {0: "catastrophic (0)", 1: "selfish (1)", tasks: f"universal ({tasks})"}
    return kinds.get(number, f"general ({number})")


def _told(rows: list[dict[str, Any]], name: str, tasks: int) -> str:
    shares = [row["share"] for row in rows if row["masks"] == name]
    general = sum(shares[2:])
    return (
        f"catastrophic {shares[0]:.1%}, selfish {shares[1]:.1%}, general {general:.1%}, "
        f"of these universal {shares[tasks]:.1%}"
    )
