"""Normalized accuracy against the number of tasks: subsets of each size, merged by several methods.

All subsets of a size, or a few that a seed draws, the same ones for every method. Methods have
the line's settings or their defaults: tuning each subset would show the tuning.
"""

import random
from itertools import combinations
from statistics import fmean, pstdev
from typing import Any

from restitch.flows.research.study.subject import Study, Subject
from restitch.merging.methods.registry import get_method
from restitch.registry.ledger.line_state import Member
from restitch.tasks.report.study_plots import Axes, lines_plot
from restitch.tasks.runtime.console import say

METHODS = ("averaging", "task-arithmetic", "ties", "consensus-ta")
# Of each size.
MOST = 4
SEED = 0


def make(subject: Subject) -> Study:
    """The study."""
    own = subject.method
    methods = [own, *(get_method(name) for name in METHODS if name != own.name)]
    rows: list[dict[str, Any]] = []
    for size in range(2, len(subject.members) + 1):
        subsets = _drawn(subject.members, size)
        for method in methods:
            say(f"{subject.line.spec.line}: {method.name}, {len(subsets)} subsets of {size}")
            found = [subject.reached(subject.prepare(method, some)) for some in subsets]
            ratios = [one.normalized for one in found if one.normalized is not None]
            rows.append(
                {
                    "count": size,
                    "method": method.name,
                    "subsets": len(subsets),
                    "mean": fmean(one.mean for one in found),
                    "normalized": fmean(ratios) if ratios else None,
                    "deviation": pstdev(ratios) if ratios else None,
                }
            )
    axes = Axes(
        ("count", "tasks"), ("normalized", "mean normalized accuracy"), "method", whole=True
    )
    plot = lines_plot("tasks", "Normalized accuracy against the number of tasks", rows, axes)
    drawn = [f"of each size at most {MOST} subsets, drawn with seed {SEED}"]
    return Study(rows, [plot], drawn)


def _drawn(members: tuple[Member, ...], size: int) -> list[tuple[Member, ...]]:
    every = list(combinations(members, size))
    if len(every) <= MOST:
        return every
    places = random.Random(SEED + size).sample(range(len(every)), MOST)
    return [every[place] for place in sorted(places)]
