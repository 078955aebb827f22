"""Seconds on this host to localize one member and to merge all members, by method.

Localizing happens once per member: the table has the mean over the members for dataless masks,
for whole task vectors, and for the line's own localizer. Merging happens for each version: it
makes the patch from the members' deltas.
"""

from restitch.flows.promotion.what_if import everything, masks_like
from restitch.flows.research.study.subject import Study, Subject
from restitch.merging.errors import BadInput
from restitch.merging.methods.registry import get_method, method_names
from restitch.registry.ledger.records import mean_of
from restitch.tasks.report.study_plots import Axes, bars_plot
from restitch.tasks.research.timing import merging_seconds
from restitch.tasks.runtime.console import say


def make(subject: Subject) -> Study:
    """The study."""
    own = subject.line.spec.localize
    notes = [
        "localize: mean seconds and bytes of a member; merge: seconds, and bytes of all deltas"
    ]
    choices = {
        "dataless": masks_like(subject.line.spec, mode="dataless"),
        "whole task vectors": everything(subject.line.spec),
    }
    if own.mode != "dataless":
        choices[own.mode] = own
    rows = []
    for name, masks in choices.items():
        what_if = subject.prepare(subject.sparse_method, subject.members, masks=masks)
        rows.append(
            {
                "step": "localize",
                "what": name,
                "seconds": mean_of(delta.seconds for delta in what_if.deltas),
                "bytes": sum(delta.size for delta in what_if.deltas) // len(what_if.deltas),
            }
        )
    methods = [get_method(name) for name in method_names()]
    for method in (method for method in methods if method.kind == "merged"):
        say(f"{subject.line.spec.line}: {method.name}")
        try:
            what_if = subject.prepare(method, subject.members)
            seconds_of_all = merging_seconds(what_if.line, what_if.members)
        except BadInput as error:  # a task lacks the rows that the method needs
            notes.append(f"{method.name} is left out: {error.summary}")
            continue
        rows.append(
            {
                "step": "merge",
                "what": method.name,
                "seconds": seconds_of_all,
                "bytes": sum(delta.size for delta in what_if.deltas),
            }
        )
    axes = Axes(("seconds", "seconds"), ("what", ""), "step", log=True)
    count = len(subject.members)
    plot = bars_plot("runtime", f"Seconds by step, {count} members", rows, axes)
    return Study(rows, [plot], notes)
