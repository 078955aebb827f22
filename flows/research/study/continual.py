"""Accuracy and cost of each step as members join one by one, in the order of registration.

The line's own method is compared with task arithmetic, TIES and Consensus. Their coefficient is
tuned at every step, if all tasks have validation rows. Every method merges all members that have
joined. The seconds of a step are those of localizing the member that joins and of the step's
merges: one merge, and one more per value that tuning tried. They exclude the evaluation of
validation rows.

If all tasks have labelled train rows, continual finetuning is compared as well: one model starts
as the base and learns the members' tasks one after another, without the rows of earlier tasks.
"""

from collections.abc import Sequence
from typing import Any

from restitch.flows.research.study.subject import NOT_TUNED, Study, Subject
from restitch.merging.methods.registry import Method
from restitch.registry.ledger.finetuned_models import Member
from restitch.tasks.report.study_plots import Axes, lines_plot
from restitch.tasks.research.finetune import finetune, lacks_labels
from restitch.tasks.research.timing import merging_seconds
from restitch.tasks.runtime.console import say

OTHERS = ("task-arithmetic", "ties", "consensus-ta")
FINETUNING = "continual finetuning"

Row = dict[str, Any]


def make(subject: Subject) -> Study:
    """The study."""
    order = sorted(subject.members, key=lambda m: (m.model.registered_at, m.task.encode()))
    methods = subject.with_own(*OTHERS)
    rows = [
        _row(subject, method, order, count, tuned=method is not methods[0])
        for count in range(2, len(order) + 1)
        for method in methods
    ]
    notes = [f"in the order {', '.join(member.task for member in order)}"]
    if not subject.can_tune:
        notes.append(NOT_TUNED)
    lacking = {m.task: lacks_labels(m.spec, subject.family) for m in order}
    without = [f"{task} lacks {missing}" for task, missing in lacking.items() if missing]
    if without:
        notes.append(f"{FINETUNING} is left out: {', '.join(without)}")
    else:
        finetuned = _finetuned(subject, order)
        rows = sorted([*rows, *finetuned[1:]], key=lambda row: int(row["count"]))
        notes += _forgetting(finetuned)
    x, mean, cost = ("count", "members"), "mean accuracy of the members", "seconds of the step"
    by_mean = Axes(x, ("mean", mean), "method", whole=True)
    by_cost = Axes(x, ("seconds", cost), "method", whole=True)
    plots = [
        lines_plot("continual", "Mean accuracy as members join", rows, by_mean),
        lines_plot("continual-seconds", "Seconds of each step", rows, by_cost),
    ]
    details = ("merges", "localize", "merge", "finetune")
    # Every row has all columns; that of a task is empty before the task joined.
    columns = dict.fromkeys([*rows[0], *(member.task for member in order)])
    rows = [columns | row for row in rows]
    return Study(rows, plots, notes, details)


def _row(
    subject: Subject, method: Method, order: Sequence[Member], count: int, *, tuned: bool
) -> Row:
    say(f"{subject.line.spec.line}: {method.name}, {count} members")
    joined = order[count - 1]
    what_if = subject.prepare(method, order[:count], tuned=tuned)
    reached = subject.reached(what_if)
    once, choice = merging_seconds(what_if.line, what_if.members), what_if.choice
    merges = 1 if choice is None else 1 + len(choice.curve)
    tasks = [member.task for member in what_if.members]
    localizing = what_if.deltas[tasks.index(joined.task)].seconds
    return {
        "count": count,
        "joined": joined.task,
        "method": method.name,
        "tuned": None if choice is None else f"{choice.setting} {choice.value:g}",
        "merges": merges,
        "localize": localizing,
        "merge": once,
        "finetune": None,
        "seconds": (localizing or 0.0) + merges * once,
        **reached.values(),
    }


def _finetuned(subject: Subject, order: Sequence[Member]) -> list[Row]:
    """A row for each task of one model that learns them one after another."""
    rows: list[Row] = []
    before = None
    for count, joined in enumerate(order, 1):
        say(f"{subject.line.spec.line}: {FINETUNING}, {joined.task}")
        patch = finetune(subject.line, joined, before)
        before = patch.blob
        row = {
            "count": count,
            "joined": joined.task,
            "method": FINETUNING,
            "merges": 0,
            "finetune": patch.seconds,
            "seconds": patch.seconds,
        }
        rows.append(row | subject.reached_with(patch, order[:count]).values())
    return rows


def _forgetting(rows: Sequence[Row]) -> list[str]:
    """The accuracy of continual finetuning on each task when it was learned and at the end."""
    first, last = rows[0], rows[-1]
    share = first["normalized"]
    of_model = "" if share is None else f", {share:.4f} of its finetuned model"
    earlier = {row["joined"]: row[row["joined"]] for row in rows[:-1]}
    changes = ", ".join(f"{task} from {v:.4f} to {last[task]:.4f}" for task, v in earlier.items())
    return [
        f"{FINETUNING} reaches {first['mean']:.4f} on {first['joined']} alone{of_model}",
        f"accuracy right after learning a task and at the end: {changes}",
    ]
