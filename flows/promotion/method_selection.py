"""Let a line's methods compete for a merge: the best by rows to choose by is its method.

    members --> each contestant's merged model (from the store, or made now) --> contest
            --> the line with the winner as its method, as if its file had named that

The outcome is kept under all that decides: members by their deltas, contestants with settings,
objective and rows. The same members have the same winner whatever their order, but where the line
limits what a merge may cost and contestants take turns: then it depends on whose turn it was. The
winner stands in the recipe of the version, and with all contestants in its record, so that neither
a later look nor a rebuild depends on a contest that is held again.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from restitch.merging.methods.registry import get_method
from restitch.registry.ledger.line_state import Member
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

# Where a version's record has what was found.
FACT = "tournament"


@dataclass(frozen=True)
class Selection:
    """A line with one method.

    Attributes:
        line: with the method that merges.
        found: what the tournament found that chose it; None where the line names one method.
    """

    line: LineRef
    found: SelectionOutcome | None = None


def earlier_selection(
    line: LineRef,
    members: tuple[Member, ...],
    benchmark: TaskSpec | None,
    records: Iterable[MergedRecord],
) -> Selection | None:
    """The line with the method that merges these members, where that needs no contest now.

    Args:
        line: the line; one that names a method stays as it is.
        members: what is merged.
        benchmark: the general benchmark.
        records: versions that may be the outcome of the same contest.

    Raises:
        BadInput: a tournament has no rows to decide by.
    """
    method = line.spec.method
    if isinstance(method, MethodSpec):
        return Selection(line)
    key = _key(line, method, members, benchmark)
    for record in records:
        found = _found_of(record)
        if found is not None and found.get("key") == key:
            return _won(line, found)
    known = known_outcome(key)
    return None if known is None else _won(line, known)


def select_method(
    line: LineRef,
    members: tuple[Member, ...],
    benchmark: TaskSpec | None,
    records: Sequence[MergedRecord],
    newest: MergedRecord | None,
) -> Selection:
    """The line with the method that merges these members.

    Args:
        line: as for `earlier_selection`, with which it begins.
        members: likewise.
        benchmark: likewise.
        records: likewise; the method of the first takes part.
        newest: the newest version, whatever became of it: it knows who waits.
    """
    before = earlier_selection(line, members, benchmark, records)
    method = line.spec.method
    if before is not None or isinstance(method, MethodSpec):
        return before or Selection(line)
    part = taking_part(method, records[0] if records else None, newest)
    contestants = [method.tournament[place] for place in part]
    lines = [LineRef(line.spec.with_method(one), line.base) for one in contestants]
    recipes = [make_recipe(lined, members) for lined in lines]
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
            for place, one, recipe in zip(part, contestants, recipes, strict=True)
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
    patches = tuple(
        stitch(lined, recipe).blob for lined, recipe in zip(lines, recipes, strict=True)
    )
    return _won(line, rank_methods(line, selection, patches))


def taking_part(
    method: TournamentSpec, in_use: MergedRecord | None, newest: MergedRecord | None
) -> list[int]:
    """The places of those who take part in a merge: the method in use, and who waited longest.

    So a merge costs `at_most` methods, and each method gets its turn again and again.

    Args:
        method: all contestants.
        in_use: the version whose method is to be beaten.
        newest: the newest version, whatever became of it.
    """
    if not method.rotates:
        return list(range(len(method.tournament)))
    queue = _queue(method, newest)
    if in_use is not None:
        recipe: Any = in_use.recipe["method"]
        held = _method(recipe)
        queue.sort(key=lambda one: one != held)
    return sorted(method.tournament.index(one) for one in queue[: method.at_most])


def told(found: SelectionOutcome) -> str:
    """The outcome in one sentence; values of other rounds are of fewer rows, and told apart."""
    first, *others = found["contestants"]
    last = [one for one in others if one["round"] == first["round"]]
    before = [one for one in others if one["round"] != first["round"]]
    sentence = f"{_reached(first)} won over {', '.join(map(_reached, last))}"
    if before:
        sentence += f"; out before that, on fewer rows: {', '.join(map(_reached, before))}"
    return sentence


def _reached(one: ContestantResult) -> str:
    return f"{one['label']} ({one['score']:.4f}{'' if one['meets'] else ', keeps too little'})"


def _queue(method: TournamentSpec, newest: MergedRecord | None) -> list[MethodSpec]:
    """All contestants in the order of their turns: new ones, who waited, who lost, who won."""
    found = None if newest is None else _found_of(newest)
    if found is None:
        return list(method.tournament)
    won, *lost = found["contestants"]
    last = [_method(one) for one in (*found.get("waiting", ()), *lost, won)]
    return sorted(method.tournament, key=lambda one: last.index(one) if one in last else -1)


def _key(
    line: LineRef,
    method: TournamentSpec,
    members: tuple[Member, ...],
    benchmark: TaskSpec | None,
) -> str:
    lines = (LineRef(line.spec.with_method(one), line.base) for one in method.tournament)
    inputs = [recipe_inputs(lined, members) for lined in lines]
    return selection_key(line, method, inputs, members, benchmark)


def _found_of(record: MergedRecord) -> SelectionOutcome | None:
    """What the tournament found that chose a version's method, if one did."""
    found = record.facts.get(FACT)
    return cast(SelectionOutcome, found) if isinstance(found, dict) else None


def _method(found: Mapping[str, Any]) -> MethodSpec:
    return MethodSpec(name=found["name"], settings=found["settings"])


def _won(line: LineRef, found: SelectionOutcome) -> Selection:
    method = _method(found["contestants"][0])
    return Selection(LineRef(line.spec.with_method(method), line.base), found)
