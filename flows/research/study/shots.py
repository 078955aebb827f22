"""Merged accuracy against the rows per class that a localizer calibrates on.

The localizer is the line's own if it uses rows, and `fisher` otherwise. The dashed line shows
dataless masks of the same density.
"""

from restitch.flows.promotion.what_if import masks_like
from restitch.flows.research.study.subject import Study, Subject
from restitch.merging.errors import BadInput
from restitch.registry.specs.localize import DEFAULT_DENSITY
from restitch.tasks.localizers import lacks
from restitch.tasks.report.study_plots import Axes, lines_plot
from restitch.tasks.runtime.console import say

SHOTS = (1, 4, 16, 64)
DEFAULT_LOCALIZER = "fisher"


def make(subject: Subject) -> Study:
    """The study.

    Raises:
        BadInput: a task has no rows to calibrate on.
    """
    given = subject.line.spec.localize
    mode = given.mode if given.reads_rows else DEFAULT_LOCALIZER
    for member in subject.members:
        missing = lacks(mode, member.spec, subject.family)
        if missing is not None:
            raise BadInput(
                f"{member.task} has no {missing}, which {mode} masks need",
                hint="add a train split to its data with `restitch register --replace-task`",
            )
    chosen = given.density if given.mode == mode else "auto"
    density = DEFAULT_DENSITY[mode] if chosen == "auto" else chosen
    own = {"preset": given.preset, "epochs": given.epochs} if given.mode == mode else {}
    method, rows = subject.sparse_method, []
    for shots in SHOTS:
        say(f"{subject.line.spec.line}: {shots} per class")
        masks = masks_like(subject.line.spec, mode=mode, density=density, shots=shots, **own)
        what_if = subject.prepare(method, subject.members, masks=masks)
        used = [int(delta.facts.get("calibration_rows", 0)) for delta in what_if.deltas]
        rows.append(
            {
                "localizer": mode,
                "shots": shots,
                "density": density,
                "rows": sum(used),
                "seconds": sum(delta.seconds or 0 for delta in what_if.deltas),
                **subject.reached(what_if).values(),
            }
        )
    plain = masks_like(subject.line.spec, mode="dataless", density=density)
    without = subject.reached(subject.prepare(method, subject.members, masks=plain))
    axes = Axes(
        ("shots", "rows per class"), ("mean", "mean accuracy, merged"), "localizer", log=True
    )
    title = f"Merged accuracy against shots: {method.name}, {density:.0%} kept"
    plot = lines_plot("shots", title, rows, axes, {"dataless": without.mean})
    row = dict.fromkeys(rows[0]) | without.values()
    rows.append({**row, "localizer": "dataless", "shots": 0, "density": density, "rows": 0})
    return Study(rows, [plot])
