"""Members join one by one, in the order of their registration: accuracy and cost of each step.

The line's own method against task arithmetic, TIES and Consensus, whose coefficient is chosen
again at every step on validation rows, where all tasks have them. Every method merges all members
that are there: only the line keeps what it found of each. Seconds are those of localizing
the member that joins, once, and of every merge of the step: one, or one more per value that was
tried. Looking at validation rows comes on top.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from flows.study.subject import Study, Subject
from merging.methods import Method, get_method
from tasks.report.study_plots import Axes, lines_plot
from tasks.reporting import say
from tasks.timing import merging_seconds

OTHERS = ("task-arithmetic", "ties", "consensus-ta")


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
            Axes(x, ("seconds", "seconds to localize and merge"), "method", whole=True),
        ),
    ]
    notes = [f"in the order {', '.join(member.task for member in order)}"]
    if not subject.can_tune:
        notes.append("coefficients are the defaults: not every task has validation rows")
    notes.append("continual finetuning is not among the methods: nothing is trained here")
    return Study(_with_all_tasks(rows, order), plots, notes, ("merges", "localize", "merge"))


def _row(
    subject: Subject, method: Method, order: Sequence[Any], count: int, *, tuned: bool
) -> dict[str, Any]:
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
        "seconds": (found or 0.0) + merges * once,
        **reached.values(),
    }


def _with_all_tasks(
    rows: Sequence[Mapping[str, Any]], order: Sequence[Any]
) -> list[dict[str, Any]]:
    """Rows with a column for each task; empty before it joined."""
    return [{**row, **{m.task: row.get(m.task) for m in order}} for row in rows]
