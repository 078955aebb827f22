"""Normalized accuracy against the number of tasks, for several methods.

Every method merges the same subsets of each size: all of them, or a few drawn with a seed.
Methods have the line's settings or their defaults, because tuning each subset would hide the
effect of the number of tasks.
"""

import random
from itertools import combinations
from statistics import fmean, pstdev
from typing import Any

from restitch.flows.research.study.subject import Study, Subject
from restitch.registry.ledger.finetuned_models import Member
from restitch.registry.ledger.records import mean_of
from restitch.tasks.report.study_plots import Axes, lines_plot
from restitch.tasks.runtime.console import say

METHODS = ("averaging", "task-arithmetic", "ties", "consensus-ta")
# Subsets of each size.
MOST = 4
SEED = 0


def make(subject: Subject) -> Study:
    """The study."""
    methods = subject.with_own(*METHODS)
    rows: list[dict[str, Any]] = []
    for size in range(2, len(subject.members) + 1):
        subsets = _drawn(subject.members, size)
        for method in methods:
            say(f"{subject.line.spec.line}: {method.name}, {len(subsets)} subsets of {size}")
            merged = [subject.reached(subject.prepare(method, subset)) for subset in subsets]
            ratios = [one.normalized for one in merged if one.normalized is not None]
            rows.append(
                {
                    "count": size,
                    "method": method.name,
                    "subsets": len(subsets),
                    "mean": fmean(one.mean for one in merged),
                    "normalized": mean_of(ratios),
                    "deviation": pstdev(ratios) if ratios else None,
                }
            )
    axes = Axes(
        ("count", "tasks"), ("normalized", "mean normalized accuracy"), "method", whole=True
    )
    plot = lines_plot("tasks", "Normalized accuracy against the number of tasks", rows, axes)
    notes = [f"at most {MOST} subsets of each size, drawn with seed {SEED}"]
    return Study(rows, [plot], notes)


def _drawn(members: tuple[Member, ...], size: int) -> list[tuple[Member, ...]]:
    subsets = list(combinations(members, size))
    if len(subsets) <= MOST:
        return subsets
    indices = random.Random(SEED + size).sample(range(len(subsets)), MOST)
    return [subsets[index] for index in sorted(indices)]
