"""Let a line's methods compete for a merge: the best by rows to choose by is its method.

    members --> each contestant's merged model (from the store, or made now) --> contest
            --> the line with the winner as its method, as if its file had named that

The outcome is kept under all that decides: members by their deltas, contestants with settings,
objective and rows. The same members have the same winner whatever their order; it stands in the
recipe of the version, and with all contestants in its record, so that neither a later look nor a
rebuild depends on a contest that is held again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from merging.methods import get_method
from merging.recipe import Recipe
from registry.head import Member
from registry.history import MergedRecord
from registry.specs import MethodSpec, TaskSpec, TournamentSpec
from tasks.contest import Contest, Entrant, contest_of, decide, outcome_of
from tasks.merge import known_recipe, make_recipe, stitch
from tasks.refs import LineRef

# Where a version's record has what was found.
FACT = "tournament"


@dataclass(frozen=True)
class Held:
    """A line with one method.

    Attributes:
        line: with the method that merges.
        found: what the tournament found that chose it; None where the line names one method.
    """

    line: LineRef
    found: dict[str, Any] | None = None


def held_before(
    line: LineRef,
    members: tuple[Member, ...],
    benchmark: TaskSpec | None,
    records: Iterable[MergedRecord],
) -> Held | None:
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
        return Held(line)
    known_recipes = [known_recipe(lined, members) for lined in _lines(line, method)]
    recipes = [recipe for recipe in known_recipes if recipe is not None]
    if len(recipes) < len(known_recipes):
        return None
    contest = _contest(line, method, members, benchmark, recipes)
    for record in records:
        found = record.facts.get(FACT)
        if isinstance(found, dict) and found.get("key") == contest.key:
            return _won(line, found)
    known = outcome_of(contest)
    return None if known is None else _won(line, known)


def hold(
    line: LineRef,
    members: tuple[Member, ...],
    benchmark: TaskSpec | None,
    records: Iterable[MergedRecord],
) -> Held:
    """The line with the method that merges these members; the arguments of `held_before`."""
    before = held_before(line, members, benchmark, records)
    method = line.spec.method
    if before is not None or isinstance(method, MethodSpec):
        return before or Held(line)
    recipes = [make_recipe(lined, members) for lined in _lines(line, method)]
    contest = _contest(line, method, members, benchmark, recipes)
    patches = tuple(
        stitch(lined, recipe).blob
        for lined, recipe in zip(_lines(line, method), recipes, strict=True)
    )
    return _won(line, decide(line, contest, patches))


def told(found: dict[str, Any]) -> str:
    """The outcome in one sentence."""
    first, *others = (
        f"{one['label']} ({one['score']:.4f}{'' if one['meets'] else ', keeps too little'})"
        for one in found["entrants"]
    )
    return f"{first} won over {', '.join(others)}"


def _contest(
    line: LineRef,
    method: TournamentSpec,
    members: tuple[Member, ...],
    benchmark: TaskSpec | None,
    recipes: Sequence[Recipe],
) -> Contest:
    entrants = tuple(
        Entrant(
            label,
            {"name": one.name, "version": get_method(one.name).version, "settings": one.settings},
            recipe.digest(),
        )
        for label, one, recipe in zip(method.labels, method.tournament, recipes, strict=True)
    )
    return contest_of(line, entrants, members, benchmark, method.objective)


def _lines(line: LineRef, method: TournamentSpec) -> list[LineRef]:
    """The line with each contestant as its method."""
    return [LineRef(line.spec.with_method(one), line.base) for one in method.tournament]


def _won(line: LineRef, found: dict[str, Any]) -> Held:
    best = found["entrants"][0]
    method = MethodSpec(name=best["name"], settings=best["settings"])
    return Held(LineRef(line.spec.with_method(method), line.base), found)
