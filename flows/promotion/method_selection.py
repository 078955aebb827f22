"""Select the method of a line that names several: a tournament on rows set aside for it.

    members --> the merged model of each contestant --> compare them on the rows
            --> the line with the winner as its method

The outcome is stored under the digest of all its inputs: members, contestants with their settings,
objective and rows. The same members have the same winner in any order. Only if the line
limits the number of methods per merge, so that contestants take turns, does the winner depend on
the turn. The winner is in the recipe of the version, and all contestants are in its record, so
neither a rebuild nor a later remerge runs the tournament again.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from restitch.merging.methods.registry import get_method
from restitch.registry.ledger.finetuned_models import Member
from restitch.registry.ledger.records import MergedRecord
from restitch.registry.specs.method import MethodSpec, TournamentSpec
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.merge import make_recipe, recipe_inputs, stitch
from restitch.tasks.method_selection import (
    Contestant,
    ContestantResult,
    MethodSelection,
    SelectionOutcome,
    known_outcome,
    rank_methods,
    selection_key,
)
from restitch.tasks.runtime.refs import LineRef

# The key of the outcome in a version's record.
FACT = "tournament"


@dataclass(frozen=True)
class Selection:
    """A line with one method, and the outcome of the tournament that selected it, if any."""

    line: LineRef
    outcome: SelectionOutcome | None = None


def earlier_selection(
    line: LineRef,
    members: tuple[Member, ...],
    benchmark: TaskSpec | None,
    records: Iterable[MergedRecord],
) -> Selection | None:
    """The line with the method that merges these members, if that needs no tournament now.

    One of `records` may be the outcome of the same tournament.

    Raises:
        BadInput: the tournament has no rows to decide on.
    """
    method = line.spec.method
    if isinstance(method, MethodSpec):
        return Selection(line)
    key = _key(line, method, members, benchmark)
    recorded = (outcome for record in records if (outcome := _outcome_of(record)) is not None)
    known = next((outcome for outcome in recorded if outcome.get("key") == key), None)
    known = known_outcome(key) if known is None else known
    return None if known is None else _selected(line, known)


def select_method(
    line: LineRef,
    members: tuple[Member, ...],
    benchmark: TaskSpec | None,
    records: Sequence[MergedRecord],
    newest: MergedRecord | None,
) -> Selection:
    """The line with the method that merges these members, after a tournament if one is needed.

    The arguments are those of `earlier_selection`, and `newest`, the newest version, promoted or
    not, which records the methods that wait. The method of the first record takes part.
    """
    earlier = earlier_selection(line, members, benchmark, records)
    method = line.spec.method
    if earlier is not None or isinstance(method, MethodSpec):
        return earlier or Selection(line)
    places = taking_part(method, records[0] if records else None, newest)
    contestants = [method.tournament[place] for place in places]
    lines = [LineRef(line.spec.with_method(one), line.base) for one in contestants]
    recipes = [make_recipe(each, members) for each in lines]
    selection = MethodSelection(
        contestants=tuple(
            Contestant(
                method.labels[place],
                {
                    "name": one.name,
                    "version": get_method(one.name).version,
                    "settings": one.settings,
                },
                recipe.digest(),
            )
            for place, one, recipe in zip(places, contestants, recipes, strict=True)
        ),
        waiting=tuple(
            {"label": method.labels[method.tournament.index(one)], **one.to_json()}
            for one in _queue(method, newest)
            if one not in contestants
        ),
        members=members,
        benchmark=benchmark if method.objective.asks_retention else None,
        objective=method.objective,
        key=_key(line, method, members, benchmark),
    )
    patches = tuple(stitch(ref, recipe).blob for ref, recipe in zip(lines, recipes, strict=True))
    return _selected(line, rank_methods(line, selection, patches))


def taking_part(
    method: TournamentSpec, in_use: MergedRecord | None, newest: MergedRecord | None
) -> list[int]:
    """The places of the methods that take part: the champion's, and those that waited longest.

    A merge costs at most `at_most` methods, and every method gets its turn: `newest`, which may
    be promoted or not, records the methods that wait.
    """
    if not method.rotates:
        return list(range(len(method.tournament)))
    queue = _queue(method, newest)
    if in_use is not None:
        recipe: Any = in_use.recipe["method"]
        defender = _method(recipe)
        queue.sort(key=lambda one: one != defender)
    return sorted(method.tournament.index(one) for one in queue[: method.at_most])


def summarize(outcome: SelectionOutcome) -> str:
    """The outcome in one sentence; scores of earlier rounds, on fewer rows, are separate."""
    first, *others = outcome["contestants"]
    last = [one for one in others if one["round"] == first["round"]]
    before = [one for one in others if one["round"] != first["round"]]
    sentence = f"{_scored(first)} won over {', '.join(map(_scored, last))}"
    if before:
        sentence += f"; eliminated earlier, on fewer rows: {', '.join(map(_scored, before))}"
    return sentence


def _scored(one: ContestantResult) -> str:
    return f"{one['label']} ({one['score']:.4f}{'' if one['meets'] else ', retains too little'})"


def _queue(method: TournamentSpec, newest: MergedRecord | None) -> list[MethodSpec]:
    """All contestants in the order of their turns: new, waiting, losing, the winner."""
    outcome = None if newest is None else _outcome_of(newest)
    if outcome is None:
        return list(method.tournament)
    winner, *losers = outcome["contestants"]
    last = [_method(one) for one in (*outcome.get("waiting", ()), *losers, winner)]
    return sorted(method.tournament, key=lambda one: last.index(one) if one in last else -1)


def _key(
    line: LineRef,
    method: TournamentSpec,
    members: tuple[Member, ...],
    benchmark: TaskSpec | None,
) -> str:
    lines = (LineRef(line.spec.with_method(one), line.base) for one in method.tournament)
    inputs = [recipe_inputs(each, members) for each in lines]
    return selection_key(line, method, inputs, members, benchmark)


def _outcome_of(record: MergedRecord) -> SelectionOutcome | None:
    """The outcome of the tournament that selected a version's method, if there was one."""
    outcome = record.facts.get(FACT)
    return cast(SelectionOutcome, outcome) if isinstance(outcome, dict) else None


def _method(values: Mapping[str, Any]) -> MethodSpec:
    return MethodSpec(name=values["name"], settings=values["settings"])


def _selected(line: LineRef, outcome: SelectionOutcome) -> Selection:
    method = _method(outcome["contestants"][0])
    return Selection(LineRef(line.spec.with_method(method), line.base), outcome)
