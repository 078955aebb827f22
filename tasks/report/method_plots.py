"""The plot of a comparison of merge methods: accuracy against retention."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from restitch.tasks.report.drawing import COLOURS, Plot, axes_in
from restitch.tasks.report.numbers import number

_MARKS = list(product(("o", "D", "s", "^", "v", "P"), ("blue", "orange", "green", "red", "sky")))


def methods_plot(rows: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Mean accuracy over the tasks against retention, one mark per method with both.

    The rows are those of `restitch compare --json`, best first.
    """
    known = [row for row in rows if row["retention"] and row["mean_accuracy"] is not None]
    if not known:
        return None
    figure, axes = axes_in(2.6, left=0.62, top=0.2, bottom=0.5, right=1.6)
    for index, row in enumerate(known):
        shape, colour = _MARKS[index % len(_MARKS)]
        retention, accuracy = row["retention"]["ratio"], row["mean_accuracy"]
        span = row["retention"].get("ratio_interval")
        if span is not None:
            at = [accuracy]
            axes.hlines(at, [span["low"]], [span["high"]], color=COLOURS[colour], linewidth=1)
        style = {"color": COLOURS[colour], "markersize": 6, "label": row["method"]}
        axes.plot([retention], [accuracy], shape, **style)
    axes.set(xlabel="retention (base: 1)", ylabel="mean accuracy over the tasks")
    axes.margins(0.12)
    axes.grid()
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), handletextpad=0.2)
    values = ", ".join(
        f"{row['method']} {number(row['mean_accuracy'])} at {number(row['retention']['ratio'])}"
        for row in known
    )
    return Plot(
        "methods",
        "Accuracy against retention by method",
        f"Mean accuracy and retention of {len(known)} methods: {values}.",
        figure,
    )
