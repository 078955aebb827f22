"""Rank merged models on rows to choose by, so that a line can select its merge method.

Successive halving: the first round evaluates every model on a part of the rows, the better half
continues on twice as many, and so on until the last round evaluates on all rows. There are only as
many rounds as leave enough rows in the first one. The cost is at most 2 log2(n) evaluations of one
model on all rows, or n + 1 where rows are few. Test rows are never used. The first outcome that is
published for the same models, rows and objective counts, whichever device computed it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from restitch.merging.digests import digest_json
from restitch.merging.errors import BadInput
from restitch.modeling.evaluation import Evaluation
from restitch.modeling.families.family import Family
from restitch.registry.ledger.finetuned_models import Member
from restitch.registry.specs.method import ObjectiveSpec, TournamentSpec
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.evaluate import Exam, choice_inputs
from restitch.tasks.inputs.checkpoints import Base, open_base
from restitch.tasks.inputs.live_base import LiveBase, live_base
from restitch.tasks.inputs.reported_rows import has_rows_to_choose_by
from restitch.tasks.inputs.task_data import evaluation_split
from restitch.tasks.runtime.console import working
from restitch.tasks.runtime.engine import Cached, step
from restitch.tasks.runtime.refs import LineRef, WeightsRef
from restitch.tasks.runtime.workspace import Workspace, workspace

# Raised when the same inputs would have another winner.
VERSION = 1

# Of each task: more would hardly tell methods apart.
MOST_ROWS = 500
# Every round uses at least this many rows of each task that has them.
LEAST_ROWS = 50

_KEY_KIND = "method-selection"


@dataclass(frozen=True)
class Contestant:
    """A merged model that takes part; `recipe` is the digest of all that determines it."""

    label: str
    method: Mapping[str, Any]
    recipe: str


@dataclass(frozen=True)
class MethodSelection:
    """The contestants, the rows and the objective.

    Attributes:
        contestants: between equals the earlier one wins.
        waiting: the methods that do not take part, with their labels; the next ones first.
        benchmark: the general benchmark, where the objective includes retention.
        key: the digest of all that decides; see `selection_key`.
    """

    contestants: tuple[Contestant, ...]
    waiting: tuple[Mapping[str, Any], ...]
    members: tuple[Member, ...]
    benchmark: TaskSpec | None
    objective: ObjectiveSpec
    key: str


class ContestantResult(TypedDict):
    """A contestant in its last round; `meets` is about the objective's minimum retention."""

    label: str
    name: str
    version: int
    settings: dict[str, Any]
    recipe: str
    tasks: dict[str, float]
    mean: float
    retention: float | None
    score: float
    meets: bool
    round: int


class SelectionOutcome(TypedDict):
    """The outcome as the store and the record of a version keep it.

    Attributes:
        contestants: from the best to the worst.
        rounds: the share of the rows, the number of contestants, and the rows by task.
        reported: the tasks whose results are reported on the rows that decided.
        cost: in evaluations of one model on all rows.
    """

    key: str
    winner: str
    objective: dict[str, Any]
    contestants: list[ContestantResult]
    waiting: list[dict[str, Any]]
    rounds: list[dict[str, Any]]
    reported: list[str]
    benchmark: str | None
    cost: float


def selection_key(
    line: LineRef,
    method: TournamentSpec,
    inputs: Sequence[str],
    members: Sequence[Member],
    benchmark: TaskSpec | None,
) -> str:
    """Check that there are rows to choose by, and digest all that decides.

    With `at_most`, the key does not depend on which contestants take part this time: an outcome for
    the same members counts, whichever took part in it. `inputs` has for each contestant the digest
    of all that determines its merged model. A worker that computes in another type may have decided
    already: then the key is that of its outcome.

    Raises:
        BadInput: a task, or the benchmark where it is needed, has no rows.
    """
    base = open_base(line, workspace())
    objective = method.objective
    _check_rows(line, members, base)
    check_benchmark(line.spec.line, objective, benchmark, base.family)
    used = benchmark if objective.asks_retention else None

    def key(base: Base) -> str:
        decides = {
            "version": [VERSION, MOST_ROWS, LEAST_ROWS],
            "contestants": list(inputs),
            "objective": objective.to_json(),
            "tasks": {m.task: choice_inputs(m.spec, base, m.model.model) for m in members},
            "benchmark": None if used is None else choice_inputs(used, base, None),
            "assets": base.ref.config,
        }
        return digest_json(decides | ({"at_most": method.at_most} if method.rotates else {}))

    own, *others = map(key, base.in_each_type())
    if not others or known_outcome(own) is not None:
        return own
    return next((other for other in others if known_outcome(other) is not None), own)


def _check_rows(line: LineRef, members: Sequence[Member], base: Base) -> None:
    without = [m.task for m in members if not has_rows_to_choose_by(m.spec, base.family)]
    if without:
        raise BadInput(
            f"the tournament of line {line.spec.line} cannot be decided",
            expected="validation rows, or labelled train rows, for every task",
            found=f"none for {', '.join(without)}",
            hint="name a validation split in the task's file and register with --replace-task, "
            "retire the task, or give the line one method",
        )


def check_benchmark(
    line: str, objective: ObjectiveSpec, benchmark: TaskSpec | None, family: Family
) -> None:
    """Refuse an objective with retention when there are no rows to measure it on.

    Raises:
        BadInput: there are none.
    """
    if not objective.asks_retention:
        return
    if benchmark is None or not has_rows_to_choose_by(benchmark, family):
        found = "no benchmark" if benchmark is None else f"none for {benchmark.task}"
        raise BadInput(
            f"the tournament of line {line} needs retention, which cannot be measured",
            expected="rows of the general benchmark in addition to those that are reported on",
            found=found,
            hint="name validation rows of the benchmark, or report on a sample of its test rows; "
            "or leave retention out of the tournament: `objective: {min_retention: 0}`",
        )


def known_outcome(key: str) -> SelectionOutcome | None:
    """The stored outcome; None where there is none yet, or it was removed."""
    outcome: SelectionOutcome | None = workspace().stored(_KEY_KIND, key)
    return outcome


@step("select method")
def rank_methods(
    line: LineRef, selection: MethodSelection, patches: tuple[str, ...]
) -> SelectionOutcome | Cached[SelectionOutcome]:
    """Rank the contestants, whose merged models are given by the digests of their patches."""
    known = known_outcome(selection.key)
    if known is not None:
        return Cached(known)
    space = workspace()
    ranked = _SuccessiveHalving(selection, open_base(line, space), space).run(patches)
    return space.keep(_KEY_KIND, selection.key, ranked)


class _SuccessiveHalving:
    """Evaluates contestants in rounds and keeps the better half after each."""

    def __init__(self, selection: MethodSelection, base: Base, space: Workspace) -> None:
        self._selection, self._space = selection, space
        self._live: LiveBase = live_base(base, "select a method")
        self._exams = {
            m.task: Exam(base, m.spec, m.model.model, space, validation=MOST_ROWS)
            for m in selection.members
        }
        self._general = (
            None
            if selection.benchmark is None
            else Exam(base, selection.benchmark, None, space, validation=MOST_ROWS)
        )

    def run(self, patches: Sequence[str]) -> SelectionOutcome:
        remaining = list(range(len(patches)))
        exams = [*self._exams.values(), *([] if self._general is None else [self._general])]
        shares = shares_of(len(remaining), min(exam.count for exam in exams))
        results: dict[int, dict[str, Any]] = {}
        rounds, losers, cost = [], list[int](), 0.0
        with working("tournament") as progress:
            for number, share in enumerate(shares, 1):
                last = number == len(shares)
                rows = self._evaluate(remaining, patches, share, last, results)
                rounds.append({"share": share, "contestants": len(remaining), "rows": rows})
                cost += share * len(remaining)
                remaining.sort(key=lambda index: _order(results[index], index))
                for index in remaining:
                    results[index]["round"] = number
                if not last:
                    half = math.ceil(len(remaining) / 2)
                    remaining, losers = sorted(remaining[:half]), remaining[half:] + losers
                progress(number, len(shares))
        selection = self._selection
        ranked: list[Any] = [
            {"label": one.label, **one.method, "recipe": one.recipe, **results[index]}
            for index in (*remaining, *losers)
            for one in (selection.contestants[index],)
        ]
        return {
            "key": selection.key,
            "winner": ranked[0]["label"],
            "objective": selection.objective.to_json(),
            "contestants": ranked,
            "waiting": [dict(one) for one in selection.waiting],
            "rounds": rounds,
            "reported": [m.task for m in selection.members if _is_reported(m.spec)],
            "benchmark": None if selection.benchmark is None else selection.benchmark.task,
            "cost": cost,
        }

    def _evaluate(
        self,
        remaining: Sequence[int],
        patches: Sequence[str],
        share: float,
        last: bool,
        results: dict[int, dict[str, Any]],
    ) -> dict[str, int]:
        """Evaluate contestants on a share of the rows; return the number of rows by task."""
        exams = {task: exam.part(share) for task, exam in self._exams.items()}
        general = None if self._general is None else self._general.part(share)
        base = None if general is None else general.take()
        for index in remaining:
            with self._live.wearing(WeightsRef("merged", patches[index]), self._space):
                tasks = {task: exam.take() for task, exam in exams.items()}
                retention, highest = None, None
                if general is not None and base is not None:
                    merged = general.take()
                    retention = base.metric.ratio(merged.value, base.value) or 0.0
                    interval = base.rows.ratio_interval(merged.rows)
                    # A few rows must not eliminate what all rows would have let pass.
                    highest = retention if last or interval is None else interval[1]
            results[index] = self._scored(tasks, retention, highest)
        counts = {task: exam.count for task, exam in exams.items()}
        if general is not None:
            counts[f"{general.spec.task} (retention)"] = general.count
        return counts

    def _scored(
        self, tasks: dict[str, Evaluation], retention: float | None, highest: float | None
    ) -> dict[str, Any]:
        objective = self._selection.objective
        mean = sum(one.worth for one in tasks.values()) / len(tasks)
        return {
            "tasks": {task: one.value for task, one in tasks.items()},
            "mean": mean,
            "retention": retention,
            "score": objective.accuracy * mean + objective.retention * (retention or 0.0),
            "meets": highest is None or highest >= (objective.min_retention or 0.0),
        }


def _order(result: Mapping[str, Any], index: int) -> tuple[bool, float, int]:
    """First those with enough retention, by score; then the others, by retention."""
    best = result["score"] if result["meets"] else result["retention"]
    return (not result["meets"], -best, index)


def shares_of(contestants: int, rows: int) -> list[float]:
    """The share of the rows that each round uses; `rows` counts those of the smallest task."""
    rounds = max(1, math.ceil(math.log2(contestants)))
    while rounds > 1 and rows * 2.0 ** (1 - rounds) < LEAST_ROWS:
        rounds -= 1
    return [2.0 ** (number - rounds) for number in range(1, rounds + 1)]


def _is_reported(spec: TaskSpec) -> bool:
    """True if the rows that decide are also those that results are reported on: no test rows."""
    return evaluation_split(spec) == "validation"
