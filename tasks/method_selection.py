"""Which of several merged models is the best, by rows that decide and are not reported on.

All are asked on a part of the rows, the better half on twice as many, and so on until the last
ones are asked on all (successive halving): as long as the smallest part has enough rows to tell
models apart. So the rows cost at most 2 log2(n) times what one model's cost, or n + 1 times where
rows are few. Test rows are never looked at. The first outcome that is published for the same
models, rows and objective is the one that counts, on whatever device it was found.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from restitch.merging.digests import digest_json
from restitch.merging.errors import BadInput
from restitch.modeling.families.family import Family
from restitch.modeling.significance import ratio_interval
from restitch.registry.ledger.line_state import Member
from restitch.registry.specs.method import ObjectiveSpec, TournamentSpec
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.evaluate import Exam, choice_inputs, has_rows_to_choose_by
from restitch.tasks.inputs.checkpoints import Base, LiveBase, live_base, open_base
from restitch.tasks.inputs.task_data import evaluation_split
from restitch.tasks.runtime.console import working
from restitch.tasks.runtime.engine import Cached, step
from restitch.tasks.runtime.refs import LineRef, WeightsRef
from restitch.tasks.runtime.workspace import Workspace, made_by, workspace

# Raised when the same inputs would have another winner.
VERSION = 1

# Of each task: more would hardly tell methods apart.
MOST_ROWS = 500
# No round asks fewer of any task that has as many.
LEAST_ROWS = 50


@dataclass(frozen=True)
class Entrant:
    """A merged model that takes part.

    Attributes:
        label: what it is called.
        facts: its method with name, version and settings.
        recipe: the digest of what determines it.
    """

    label: str
    facts: Mapping[str, Any]
    recipe: str


@dataclass(frozen=True)
class Contest:
    """Who takes part, and by which rows and rule.

    Attributes:
        entrants: in the order that decides between equals.
        waiting: the methods that do not, with their labels, those first that come next.
        members: whose tasks are asked.
        benchmark: the general benchmark, where the objective asks for retention.
        objective: which is the best.
        key: the digest of all that decides; see `contest_key`.
    """

    entrants: tuple[Entrant, ...]
    waiting: tuple[Mapping[str, Any], ...]
    members: tuple[Member, ...]
    benchmark: TaskSpec | None
    objective: ObjectiveSpec
    key: str


def contest_key(
    line: LineRef,
    method: TournamentSpec,
    inputs: Sequence[str],
    members: Sequence[Member],
    benchmark: TaskSpec | None,
) -> str:
    """The digest of all that decides a contest, after making sure that there are rows for it.

    Where not all contestants take part, it does not say who does: what was found of the same
    members counts whoever did.

    Args:
        line: with the base.
        method: the contestants and the rule.
        inputs: for each contestant the digest of all that determines what it makes.
        members: whose tasks are asked.
        benchmark: the general benchmark.

    Raises:
        BadInput: a task, or the benchmark where it is asked for, has no rows.
    """
    base = open_base(line, workspace())
    objective = method.objective
    _check_rows(line, members, base)
    check_benchmark(line.spec.line, objective, benchmark, base.family)
    asked = benchmark if objective.asks_retention else None
    decides = {
        "version": [VERSION, MOST_ROWS, LEAST_ROWS],
        "entrants": list(inputs),
        "objective": objective.to_json(),
        "tasks": {m.task: choice_inputs(m.spec, base, m.model.model) for m in members},
        "benchmark": None if asked is None else choice_inputs(asked, base, None),
        "assets": base.ref.config,
    }
    return digest_json(decides | ({"at_most": method.at_most} if method.rotates else {}))


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
    """Refuse an objective that asks for retention where no rows can tell it.

    Raises:
        BadInput: it does.
    """
    if not objective.asks_retention:
        return
    if benchmark is None or not has_rows_to_choose_by(benchmark, family):
        named = "no benchmark" if benchmark is None else f"none for {benchmark.task}"
        raise BadInput(
            f"the tournament of line {line} asks for retention, which cannot be measured",
            expected="rows of the general benchmark beside those that are reported on",
            found=named,
            hint="name validation rows of the benchmark, or a sample of its test rows to report "
            "on; or let the tournament ask for none: `objective: {min_retention: 0}`",
        )


def outcome_of(key: str) -> dict[str, Any] | None:
    """What was found before; None where it was not decided yet, or is not kept any more."""
    return _look_up(workspace(), key)


@step("contest")
def decide(
    line: LineRef, contest: Contest, patches: tuple[str, ...]
) -> dict[str, Any] | Cached[dict[str, Any]]:
    """The outcome of a contest.

    Args:
        line: with the base.
        contest: who takes part.
        patches: the entrants' merged models, by the digests of their patches.

    Returns:
        `winner`, `entrants` from the best to the worst, each with what it reached in the last
        `round` that it was in; `waiting`, the methods that did not take part; `rounds` with the
        rows that were asked; and what it cost.
    """
    space = workspace()
    known = _look_up(space, contest.key)
    if known is not None:
        return Cached(known)
    base = open_base(line, space)
    jury = _Jury(contest, base, space)
    found = jury.decide(patches)
    space.objects.publish("contest", contest.key, space.objects.put_json(found), made_by())
    return _look_up(space, contest.key) or found


def _look_up(space: Workspace, key: str) -> dict[str, Any] | None:
    record = space.objects.lookup("contest", key)
    if record is None:
        return None
    found: dict[str, Any] = json.loads(space.objects.read_blob(record.blob))
    return found


class _Jury:
    """The exams of a contest, and who is the best by them."""

    def __init__(self, contest: Contest, base: Base, space: Workspace) -> None:
        self._contest, self._space = contest, space
        self._live: LiveBase = live_base(base)
        self._exams = {
            m.task: Exam(base, m.spec, m.model.model, space, validation=MOST_ROWS)
            for m in contest.members
        }
        self._general = (
            None
            if contest.benchmark is None
            else Exam(base, contest.benchmark, None, space, validation=MOST_ROWS)
        )

    def decide(self, patches: Sequence[str]) -> dict[str, Any]:
        places = list(range(len(patches)))
        exams = [*self._exams.values(), *([] if self._general is None else [self._general])]
        shares = shares_of(len(places), min(exam.count for exam in exams))
        found: dict[int, dict[str, Any]] = {}
        rounds, out, cost = [], list[int](), 0.0
        with working("tournament") as progress:
            for number, share in enumerate(shares, 1):
                last = number == len(shares)
                rows = self._ask(places, patches, share, last, found)
                rounds.append({"share": share, "entrants": len(places), "rows": rows})
                cost += share * len(places)
                places.sort(key=lambda place: _order(found[place], place))
                for place in places:
                    found[place]["round"] = number
                if not last:
                    kept = math.ceil(len(places) / 2)
                    places, out = sorted(places[:kept]), places[kept:] + out
                progress(number, len(shares))
        ranked = [
            {"label": e.label, **e.facts, "recipe": e.recipe, **found[place]}
            for place in (*places, *out)
            for e in (self._contest.entrants[place],)
        ]
        return {
            "key": self._contest.key,
            "winner": ranked[0]["label"],
            "objective": self._contest.objective.to_json(),
            "entrants": ranked,
            "waiting": [dict(one) for one in self._contest.waiting],
            "rounds": rounds,
            "reported": [m.task for m in self._contest.members if _is_reported(m.spec)],
            "benchmark": None if self._contest.benchmark is None else self._contest.benchmark.task,
            "cost": cost,
        }

    def _ask(
        self,
        places: Sequence[int],
        patches: Sequence[str],
        share: float,
        last: bool,
        found: dict[int, dict[str, Any]],
    ) -> dict[str, int]:
        """Ask entrants on a part of the rows; how many of each task that was."""
        exams = {task: exam.part(share) for task, exam in self._exams.items()}
        general = None if self._general is None else self._general.part(share)
        base = None if general is None else general.take()
        for place in places:
            with self._live.wearing(WeightsRef("merged", patches[place]), self._space):
                tasks = {task: exam.take().value for task, exam in exams.items()}
                kept, most = None, None
                if general is not None and base is not None:
                    merged = general.take()
                    kept = merged.top1 / base.top1 if base.top1 else 0.0
                    spread = ratio_interval(base.correct_rows(), merged.correct_rows())
                    # Few rows must not put out what all of them would have let pass.
                    most = kept if last or spread is None else spread[1]
            found[place] = self._scored(tasks, kept, most)
        counts = {task: exam.count for task, exam in exams.items()}
        return (
            counts
            if general is None
            else {**counts, f"{general.spec.task} (retention)": general.count}
        )

    def _scored(
        self, tasks: dict[str, float], kept: float | None, most: float | None
    ) -> dict[str, Any]:
        objective = self._contest.objective
        mean = sum(tasks.values()) / len(tasks)
        return {
            "tasks": tasks,
            "mean": mean,
            "retention": kept,
            "score": objective.accuracy * mean + objective.retention * (kept or 0.0),
            "meets": most is None or most >= (objective.min_retention or 0.0),
        }


def _order(found: Mapping[str, Any], place: int) -> tuple[bool, float, int]:
    """Those that keep enough by their score, then the others by what they keep."""
    best = found["score"] if found["meets"] else found["retention"]
    return (not found["meets"], -best, place)


def shares_of(entrants: int, rows: int) -> list[float]:
    """Which part of the rows each round asks.

    Args:
        entrants: how many there are.
        rows: how many the task with the fewest has.
    """
    rounds = max(1, math.ceil(math.log2(entrants)))
    while rounds > 1 and rows * 2.0 ** (1 - rounds) < LEAST_ROWS:
        rounds -= 1
    return [2.0 ** (number - rounds) for number in range(1, rounds + 1)]


def _is_reported(spec: TaskSpec) -> bool:
    """Whether what decides is what results are reported on, for want of test rows."""
    return evaluation_split(spec) == "validation"
