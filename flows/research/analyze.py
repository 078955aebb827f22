"""Analyze the members of a line: the papers' figures for the user's own models.

    members in use --> per task and localizer: graft growing masks of one ranking --> curves
                   --> two members: merge growing masks --> accuracy against overlap
                   --> all masks: their overlap and their location

The line does not change, and no decision depends on the result: accuracy is measured on the rows
that results are reported on. Measurements are stored, so that a second run computes nothing;
`restitch gc` removes them. By default, no localizer computes gradients except the line's own.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from restitch.flows.promotion.snapshot import Snapshot, take_snapshot
from restitch.flows.research.study_output import StudyOutcome, publish_study
from restitch.merging.errors import BadInput, unknown_name
from restitch.modeling.families.family import Family, get_family
from restitch.registry.ledger.finetuned_models import Member
from restitch.tasks.evaluate import evaluate
from restitch.tasks.inputs.task_data import evaluation_split
from restitch.tasks.localizers import LOCALIZERS, lacks
from restitch.tasks.report.drawing import drawing, to_png
from restitch.tasks.report.growth_plots import conflict_plot, curves_plot
from restitch.tasks.report.mask_plots import (
    components_plot,
    cosine_plot,
    jaccard_plot,
    layers_plot,
    overlap_plot,
    owners_plot,
    similarity,
)
from restitch.tasks.research.density_curves import conflict, curve
from restitch.tasks.research.mask_analysis import analyze as compare_masks
from restitch.tasks.runtime.console import say
from restitch.tasks.runtime.engine import flow
from restitch.tasks.runtime.refs import ResultRef, WeightsKind, WeightsRef
from restitch.tasks.runtime.workspace import workspace

DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
DEFAULT_LOCALIZERS = ("dataless", "random")

_MASK_PLOTS = (
    jaccard_plot,
    overlap_plot,
    cosine_plot,
    layers_plot,
    components_plot,
    owners_plot,
)


@dataclass(frozen=True, kw_only=True)
class Analysis(StudyOutcome):
    """Measurements of the masks of the version in use.

    Attributes:
        tasks: for each task its base, its finetuned model, its mask in use, and a curve for each
            localizer; `left_out` names localizers that lack something.
        pair: two members merged with growing masks; None with fewer than two members.
        masks: the overlap and the location of all masks.
    """

    version: int
    localizers: list[str]
    densities: list[float]
    seed: int
    tasks: dict[str, dict[str, Any]]
    pair: dict[str, Any] | None
    masks: dict[str, Any]


@flow("analyze", "{line}")
def analyze(
    line: str,
    tasks: Sequence[str] = (),
    pair: Sequence[str] = (),
    localizers: Sequence[str] = (),
    densities: Sequence[float] = (),
    out: str | None = None,
) -> Analysis:
    """Measure the masks of the version in use.

    Args:
        line: the line's name.
        tasks: the tasks to draw curves for; by default all with rows to evaluate on.
        pair: two tasks to merge with each other; by default the two of `tasks` whose masks
            overlap most.
        localizers: their names; by default `DEFAULT_LOCALIZERS` and the line's own.
        densities: the densities of the masks that are cut from each ranking.
        out: a folder for `analysis.json` and the plots.

    Raises:
        BadInput: there is no such task or localizer, or no version in use.
    """
    space = workspace()
    snapshot = take_snapshot(space.ledger(line))
    family = get_family(snapshot.line_state.spec.family)
    own = snapshot.line_state.spec.localize.mode
    names = tuple(dict.fromkeys(localizers or (*DEFAULT_LOCALIZERS, *_of_masks(own))))
    for name in names:
        if name not in LOCALIZERS:
            raise unknown_name("localizer", name, LOCALIZERS)
    cuts = _checked_densities(densities or DENSITIES)
    if snapshot.champion is None or not snapshot.champion_members:
        raise BadInput(f"line {line} has no members to analyze", hint="register models first")
    members = _chosen(snapshot, tasks)
    known = {m.task: m for m in (_chosen(snapshot, pair) if pair else members)}
    if pair and len(known) != 2:
        raise BadInput(
            "a pair is two tasks", expected="--pair A,B", found=", ".join(pair) or "nothing"
        )
    masks = compare_masks(snapshot.line, snapshot.champion)
    merged_pair = _largest_overlap(masks, known)
    outcome = Analysis(
        line=line,
        version=snapshot.champion.version,
        members={m.task: m.version for m in snapshot.champion_members},
        localizers=list(names),
        densities=list(cuts),
        seed=snapshot.line_state.spec.localize.seed,
        tasks={m.task: _measure(snapshot, m, names, cuts, family) for m in members},
        pair=None if merged_pair is None else _measure_pair(snapshot, merged_pair, cuts, family),
        masks=masks,
    )
    params = ("version", "members", "localizers", "densities", "seed")
    publish_study(
        outcome,
        f"masks of {line} {outcome.version} analyzed",
        out,
        name="analysis",
        params={name: getattr(outcome, name) for name in params},
        metrics=_metrics(outcome),
        artifacts=_pictures(outcome),
    )
    return outcome


def _measure(
    snapshot: Snapshot,
    member: Member,
    names: Sequence[str],
    densities: tuple[float, ...],
    family: Family,
) -> dict[str, Any]:
    """The curves of one task, and the models that bound them."""
    line, facts, ref = snapshot.line, member.model.facts, member.model.model

    def measured(kind: WeightsKind, identity: str = "", uri: str = "") -> dict[str, Any]:
        return _value(evaluate(line, member.spec, WeightsRef(kind, identity, uri), ref))

    whole = measured("localizable", ref.weights, ref.uri)
    curves, left_out = {}, {}
    for name in names:
        missing = lacks(name, member.spec, family)
        if missing is not None:
            say(f"{member.task} has no {missing}: its {name} masks are left out")
            left_out[name] = missing
            continue
        say(f"{member.task}: {name}")
        curves[name] = curve(line, member, name, densities, whole)
    return {
        "metric": member.spec.metric,
        "split": evaluation_split(member.spec),
        "base": measured("base"),
        "finetuned": measured("finetuned", ref.weights, ref.uri),
        "own": {
            "localizer": facts.localizer,
            "density": facts.density,
            "kept": facts.kept,
            **measured("grafted", str(member.model.delta)),
        },
        "curves": curves,
        "left_out": left_out,
    }


def _measure_pair(
    snapshot: Snapshot, pair: tuple[Member, Member], densities: tuple[float, ...], family: Family
) -> dict[str, Any]:
    """Two members merged with growing masks of the line's own localizer, if both can use it."""
    own = _of_masks(snapshot.line_state.spec.localize.mode)
    usable = own and not any(lacks(own[0], member.spec, family) for member in pair)
    say(f"{snapshot.line_state.line}: {pair[0].task} and {pair[1].task} together")
    return conflict(snapshot.line_in_use, pair, own[0] if usable else "dataless", densities)


def _of_masks(mode: str) -> tuple[str, ...]:
    """The line's own localizer, if it ranks coordinates for masks."""
    return (mode,) if mode in LOCALIZERS else ()


def _value(result: ResultRef) -> dict[str, Any]:
    interval = {"low": result.low, "high": result.high}
    return {"value": result.value, "interval": interval, "count": result.count}


def _chosen(snapshot: Snapshot, tasks: Sequence[str]) -> list[Member]:
    """The members of these tasks; without tasks, all that can be evaluated."""
    known = {member.task: member for member in snapshot.champion_members}
    for task in tasks:
        if task not in known:
            raise unknown_name("task of the version in use", task, known)
    chosen = [known[task] for task in dict.fromkeys(tasks)] or list(known.values())
    without = [m.task for m in chosen if evaluation_split(m.spec) is None]
    if tasks and without:
        raise BadInput(
            f"no rows to evaluate {', '.join(without)} on",
            expected="tasks with test or validation rows",
            hint="describe their data with `restitch register --replace-task`",
        )
    return [member for member in chosen if member.task not in without]


def _largest_overlap(
    masks: Mapping[str, Any], members: Mapping[str, Member]
) -> tuple[Member, Member] | None:
    """The two members whose masks or subspaces have the most in common; the first two of equals."""
    indices = [i for i, task in enumerate(masks["tasks"]) if task in members]
    pairs = list(combinations(indices, 2))
    if not pairs:
        return None
    a, b = max(pairs, key=lambda pair: similarity(masks)[pair[0]][pair[1]] or 0.0)
    return members[masks["tasks"][a]], members[masks["tasks"][b]]


def _checked_densities(densities: Iterable[float]) -> tuple[float, ...]:
    distinct = tuple(sorted(set(densities)))
    for density in distinct:
        if not 0 < density <= 1:
            raise BadInput(
                f"the density {density:g} cannot be used",
                expected="fractions above 0 and up to 1, such as 0.01,0.1,1",
                found=density,
                hint="correct --densities",
            )
    return distinct


def _pictures(outcome: Analysis) -> dict[str, bytes]:
    with drawing("analysis"):
        drawn = [curves_plot(task, measured) for task, measured in outcome.tasks.items()]
        drawn += [] if outcome.pair is None else [conflict_plot(outcome.pair)]
        drawn += [make(outcome.masks) for make in _MASK_PLOTS]
    return {f"{plot.name}.png": to_png(plot) for plot in drawn if plot is not None}


def _metrics(outcome: Analysis) -> dict[str, float]:
    """The charts in MLflow: the value of each graft, by task, localizer and density."""
    return {
        f"{task}/{name}/{point['density']:g}": point["value"]
        for task, measured in outcome.tasks.items()
        for name, graph in measured["curves"].items()
        for point in graph["points"]
    }
