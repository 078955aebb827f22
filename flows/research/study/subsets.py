"""Accuracy of similar and of dissimilar subsets of the tasks, judged by the overlap of masks.

A subset has half of the tasks (at least two). Its similarity is the mean Jaccard index over its
pairs of masks; a line that keeps whole task vectors is judged by dataless masks. The most and the
least similar subsets are merged by the line's method and by task arithmetic.
"""

from collections.abc import Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

from restitch.flows.research.study.subject import Study, Subject
from restitch.merging.errors import BadInput
from restitch.registry.ledger.finetuned_models import Member
from restitch.registry.ledger.records import mean_of
from restitch.tasks.report.study_plots import Axes, points_plot
from restitch.tasks.research.mask_analysis import analyze
from restitch.tasks.runtime.console import say

# Subsets of each group. The number of all subsets grows exponentially with the tasks.
MOST = 4
OTHER = "task-arithmetic"


def make(subject: Subject) -> Study:
    """The study.

    Raises:
        BadInput: there are fewer than three members.
    """
    if len(subject.members) < 3:
        raise BadInput(
            f"line {subject.line.spec.line} has two members, which form only one subset",
            expected="three members or more with rows to evaluate on",
        )
    jaccard = _jaccard(subject)
    size = max(2, len(subject.members) // 2)
    ranked = sorted(
        combinations(subject.members, size), key=lambda subset: -_similarity(subset, jaccard)
    )
    half = min(MOST, (len(ranked) + 1) // 2)
    groups = {"similar": ranked[:half], "dissimilar": ranked[half:][-MOST:]}
    methods = subject.with_own(OTHER)
    rows = []
    for group, subsets in groups.items():
        for subset in subsets:
            names = " ".join(member.task for member in subset)
            say(f"{subject.line.spec.line}: {names}")
            for method in methods:
                reached = subject.reached(subject.prepare(method, subset))
                rows.append(
                    {
                        "group": group,
                        "tasks": names,
                        "similarity": _similarity(subset, jaccard),
                        "method": method.name,
                        "mean": reached.mean,
                        "normalized": reached.normalized,
                    }
                )
    axes = Axes(
        ("similarity", "mean Jaccard index of the masks of a subset"),
        ("normalized", "normalized accuracy, merged"),
        "method",
    )
    title = f"Similar and dissimilar subsets of {size} tasks"
    notes = [
        f"{method.name}: {_mean(rows, 'similar', method.name)} on similar subsets, "
        f"{_mean(rows, 'dissimilar', method.name)} on dissimilar ones (mean normalized)"
        for method in methods
    ]
    return Study(rows, [points_plot("subsets", title, rows, axes)], notes)


def _jaccard(subject: Subject) -> dict[tuple[str, str], float]:
    """The Jaccard index of the masks of each pair of tasks."""
    champion = subject.snapshot.champion
    assert champion is not None, "a line with members in use has a champion"
    sparse = subject.prepare(subject.sparse_method, subject.members)
    members = {
        m.task: champion.members[m.task].model_copy(update={"delta": str(m.model.delta)})
        for m in sparse.members
    }
    masks = analyze(subject.line, champion.model_copy(update={"members": members}))
    tasks = masks["tasks"]
    return {
        (one, other): masks["jaccard"][i][j] or 0.0
        for i, one in enumerate(tasks)
        for j, other in enumerate(tasks)
    }


def _similarity(subset: Sequence[Member], jaccard: dict[tuple[str, str], float]) -> float:
    return fmean(jaccard[one.task, other.task] for one, other in combinations(subset, 2))


def _mean(rows: Sequence[dict[str, Any]], group: str, method: str) -> str:
    chosen = (row for row in rows if (row["group"], row["method"]) == (group, method))
    mean = mean_of(row["normalized"] for row in chosen)
    return "not measured" if mean is None else f"{mean:.4f}"
