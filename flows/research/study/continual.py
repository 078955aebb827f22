"""Members join one by one, in the order of their registration: accuracy and cost of each step.

The line's own method against task arithmetic, TIES and Consensus, whose coefficient is chosen
again at every step on validation rows, where all tasks have them. Every method merges all members
that are there: only the line keeps what it found of each. Seconds are those of localizing
the member that joins, once, and of every merge of the step: one, or one more per value that was
tried. Looking at validation rows comes on top.

Beside them, where all tasks have labelled train rows, is continual finetuning: one model that
begins as the base and learns each member's task in turn, with the earlier ones' rows gone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from restitch.flows.research.study.subject import Study, Subject
from restitch.merging.methods.registry import Method, get_method
from restitch.registry.ledger.line_state import Member
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
    own = subject.method
    methods = [own, *(get_method(name) for name in OTHERS if name != own.name)]
    rows = [
        _row(subject, method, order, count, tuned=method is not own)
        for count in range(2, len(order) + 1)
        for method in methods
    ]
    notes = [f"in the order {', '.join(member.task for member in order)}"]
    if not subject.can_tune:
        notes.append("coefficients are the defaults: not every task has validation rows")
    lacking = {m.task: lacks_labels(m.spec, subject.family) for m in order}
    without = [f"{task} lacks {what}" for task, what in lacking.items() if what is not None]
    if without:
        notes.append(f"{FINETUNING} is left out: {', '.join(without)}")
    else:
        learned = _finetuned(subject, order)
        rows = sorted([*rows, *learned[1:]], key=lambda row: int(row["count"]))
        notes += _forgotten(learned)
    x = ("count", "members")
    plots = [
        lines_plot(
            "continual",
            "Mean accuracy as members join",
            rows,
            Axes(x, ("mean", "mean accuracy of those that joined"), "method", whole=True),
        ),
        lines_plot(
            "continual-seconds",
            "Seconds of each step",
            rows,
            Axes(x, ("seconds", "seconds of the step"), "method", whole=True),
        ),
    ]
    details = ("merges", "localize", "merge", "finetune")
    return Study(_with_all_tasks(rows, order), plots, notes, details)


def _row(
    subject: Subject, method: Method, order: Sequence[Member], count: int, *, tuned: bool
) -> Row:
    say(f"{subject.line.spec.line}: {method.name}, {count} members")
    joined = order[count - 1]
    trial = subject.prepare(method, order[:count], tuned=tuned)
    reached = subject.reached(trial)
    once = merging_seconds(trial.line, trial.members)
    merges = 1 if trial.choice is None else 1 + len(trial.choice.curve)
    places = [member.task for member in trial.members]
    found = trial.deltas[places.index(joined.task)].seconds
    return {
        "count": count,
        "joined": joined.task,
        "method": method.name,
        "tuned": None if trial.choice is None else f"{trial.choice.setting} {trial.choice.value:g}",
        "merges": merges,
        "localize": found,
        "merge": once,
        "finetune": None,
        "seconds": (found or 0.0) + merges * once,
        **reached.values(),
    }


def _finetuned(subject: Subject, order: Sequence[Member]) -> list[Row]:
    """One model that learns one task after the other; a row for each, the first one too."""
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
            "tuned": None,
            "merges": 0,
            "localize": None,
            "merge": None,
            "finetune": patch.seconds,
            "seconds": patch.seconds,
        }
        rows.append(row | subject.reached_with(patch, order[:count]).values())
    return rows


def _forgotten(rows: Sequence[Row]) -> list[str]:
    """What a model that learns one task after the other reached of each, and has at the end."""
    first, last = rows[0], rows[-1]
    share = first["normalized"]
    of_model = "" if share is None else f", {share:.4f} of its finetuned model"
    earlier = {row["joined"]: row[row["joined"]] for row in rows[:-1]}
    kept = ", ".join(f"{task} {value:.4f} to {last[task]:.4f}" for task, value in earlier.items())
    return [
        f"{FINETUNING} reaches {first['mean']:.4f} on {first['joined']} alone{of_model}",
        f"from when a task was learned to the end it goes from {kept}",
    ]


def _with_all_tasks(rows: Sequence[Mapping[str, Any]], order: Sequence[Member]) -> list[Row]:
    """Rows with a column for each task; empty before it joined."""
    return [{**row, **{m.task: row.get(m.task) for m in order}} for row in rows]
