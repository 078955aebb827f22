"""Merged accuracy against density: all members are merged with growing masks.

The masks come from the dataless localizer, and from the line's own if every task has the rows
that it needs. The dashed line is the plain average of the whole task vectors.
"""

from restitch.flows.research.study.subject import Study, Subject
from restitch.tasks.localizers import LOCALIZERS, lacks
from restitch.tasks.report.study_plots import Axes, lines_plot
from restitch.tasks.research.density_curves import conflict
from restitch.tasks.runtime.console import say

DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
DATALESS = "dataless"


def make(subject: Subject) -> Study:
    """The study."""
    given, notes = subject.line.spec.localize.mode, []
    own = given if given in LOCALIZERS else DATALESS
    missing = {m.task: lacks(own, m.spec, subject.family) for m in subject.members}
    without = [task for task, rows in missing.items() if rows is not None]
    names = [DATALESS] if without or own == DATALESS else [DATALESS, own]
    if without:
        notes.append(f"no {own} masks: {', '.join(without)} lacks {missing[without[0]]}")
    rows, average = [], 0.0
    for name in names:
        say(f"{subject.line.spec.line}: {name}")
        curve = conflict(subject.line, subject.members, name, DENSITIES)
        average = float(curve["averaging"]["mean"])
        rows += [
            {
                "localizer": name,
                "density": point["density"],
                "method": curve["method"],
                "shared": point["share"],
                "mean": point["mean"],
                **{task: value["value"] for task, value in point["tasks"].items()},
            }
            for point in curve["points"]
        ]
    axes = Axes(
        ("density", "share of the weights that a mask keeps"),
        ("mean", "mean accuracy, merged"),
        "localizer",
        log=True,
        percent=True,
    )
    title = f"Merged accuracy against density: {rows[0]['method']}"
    plot = lines_plot("density", title, rows, axes, {"averaging": average})
    notes.append(f"averaging whole task vectors reaches {average:.4f}")
    return Study(rows, [plot], notes)
