"""Analyze the members of a line: the figures of the papers for one's own models.

    members in use --> per task and localizer: graft more and more of one ranking --> curves
                   --> two of them: merge larger and larger masks --> accuracy against overlap
                   --> all masks: what they share, and where they lie

Nothing of the line changes, and nothing is decided here: accuracy is that on the rows that
results are reported on. What was measured is kept in the store, so that a repetition makes
nothing anew; `restitch gc` removes it. Localizers that cost gradients run where they are asked
for, and where one of them is the line's own.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from restitch.flows.promotion.snapshot import Snapshot, take_snapshot
from restitch.flows.research.studies import log_study, write_study
from restitch.merging.digests import canonical_json
from restitch.merging.errors import BadInput
from restitch.modeling.families.family import Family, get_family
from restitch.registry.ledger.line_state import Member
from restitch.tasks.evaluate import evaluate
from restitch.tasks.inputs.task_data import evaluation_split
from restitch.tasks.localizers import LOCALIZERS, lacks
from restitch.tasks.report.drawing import Plot, drawing, to_png
from restitch.tasks.report.growth_plots import conflict_plot, curves_plot
from restitch.tasks.report.mask_plots import (
    components_plot,
    cosine_plot,
    jaccard_plot,
    layers_plot,
    owners_plot,
)
from restitch.tasks.research.density_curves import conflict, curve
from restitch.tasks.research.mask_analysis import analyze as compare_masks
from restitch.tasks.runtime.console import say
from restitch.tasks.runtime.engine import flow
from restitch.tasks.runtime.refs import ResultRef, WeightsRef
from restitch.tasks.runtime.workspace import actor, workspace

DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
USUAL = ("dataless", "random")

_MASK_PLOTS = (jaccard_plot, cosine_plot, layers_plot, components_plot, owners_plot)


@flow("analyze", "{line}")
def analyze(
    line: str,
    tasks: Sequence[str] = (),
    pair: Sequence[str] = (),
    localizers: Sequence[str] = (),
    densities: Sequence[float] = (),
    out: str | None = None,
) -> dict[str, Any]:
    """Measure the masks of the version in use.

    Args:
        line: its name.
        tasks: whose curves; by default all that have rows to evaluate on.
        pair: the two that are merged with each other; by default the two of `tasks` whose masks
            overlap most.
        localizers: which; by default `USUAL` and the line's own.
        densities: where rankings are cut.
        out: a folder for `analysis.json` and the plots.

    Raises:
        BadInput: no such task or localizer, or no version in use.
    """
    space = workspace()
    snapshot = take_snapshot(space.ledger(line))
    family = get_family(snapshot.line_state.spec.family)
    own = snapshot.line_state.spec.localize.mode
    names = tuple(dict.fromkeys(localizers or (*USUAL, own)))
    for name in names:
        _check("localizer", name, LOCALIZERS)
    cuts = _checked_densities(densities or DENSITIES)
    if snapshot.champion is None or not snapshot.champion_members:
        raise BadInput(f"line {line} has no members to analyze", hint="register models first")
    members = _chosen(snapshot, tasks)
    known = {m.task: m for m in _chosen(snapshot, pair)} if pair else _by_task(members)
    if pair and len(known) != 2:
        raise BadInput(
            "a pair is two tasks", expected="--pair A,B", found=", ".join(pair) or "nothing"
        )
    masks = compare_masks(snapshot.line, snapshot.champion)
    found: dict[str, Any] = {
        "line": line,
        "version": snapshot.champion.version,
        "members": {m.task: m.version for m in snapshot.champion_members},
        "localizers": list(names),
        "densities": list(cuts),
        "seed": snapshot.line_state.spec.localize.seed,
        "tasks": {m.task: _measure(snapshot, m, names, cuts, family) for m in members},
        "pair": None,
        "masks": masks,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "actor": actor(),
    }
    two = _overlapping_most(masks, known)
    if two is not None:
        usable = not any(lacks(own, member.spec, family) for member in two)
        say(f"{line}: {two[0].task} and {two[1].task} together")
        found["pair"] = conflict(snapshot.line_in_use, two, own if usable else "dataless", cuts)
    artifacts = {"analysis.json": canonical_json(found), **_pictures(found)}
    write_study(out, artifacts)
    told = ("version", "members", "localizers", "densities", "seed")
    params = {name: found[name] for name in told}
    log_study(
        found, f"masks of {line} {found['version']} analyzed", params, _metrics(found), artifacts
    )
    return found


def _by_task(members: Iterable[Member]) -> dict[str, Member]:
    """Members by the name of their task."""
    return {member.task: member for member in members}


def _measure(
    snapshot: Snapshot,
    member: Member,
    names: Sequence[str],
    densities: tuple[float, ...],
    family: Family,
) -> dict[str, Any]:
    """One task: its curves, and what they lie between."""
    line, spec, model = snapshot.line, member.spec, member.model
    curves, left_out = {}, {}
    for name in names:
        missing = lacks(name, spec, family)
        if missing is not None:
            say(f"{member.task} has no {missing}: no {name} masks")
            left_out[name] = missing
            continue
        say(f"{member.task}: {name}")
        curves[name] = curve(line, member, name, densities)
    whole = WeightsRef("finetuned", model.model.weights, model.model.uri)
    facts = model.facts
    return {
        "metric": spec.metric,
        "split": evaluation_split(spec),
        "base": _value(evaluate(line, spec, WeightsRef("base"), model.model)),
        "finetuned": _value(evaluate(line, spec, whole, model.model)),
        "own": {
            "localizer": facts.localizer,
            "density": facts.density,
            "kept": facts.kept,
            **_value(evaluate(line, spec, WeightsRef("grafted", str(model.delta)), model.model)),
        },
        "curves": curves,
        "left_out": left_out,
    }


def _value(result: ResultRef) -> dict[str, Any]:
    interval = {"low": result.low, "high": result.high}
    return {"value": result.value, "interval": interval, "count": result.count}


def _chosen(snapshot: Snapshot, tasks: Sequence[str]) -> list[Member]:
    """The members of these tasks; of all that can be evaluated where none is named."""
    known = _by_task(snapshot.champion_members)
    for task in tasks:
        _check("task of the version in use", task, known)
    chosen = [known[task] for task in dict.fromkeys(tasks)] or list(known.values())
    without = [m.task for m in chosen if evaluation_split(m.spec) is None]
    if tasks and without:
        raise BadInput(
            f"{', '.join(without)} cannot be analyzed",
            expected="a task with rows to evaluate on",
            hint="describe its data with `restitch register --replace-task`",
        )
    return [member for member in chosen if member.task not in without]


def _overlapping_most(
    masks: Mapping[str, Any], members: Mapping[str, Member]
) -> tuple[Member, Member] | None:
    """The two members whose masks have the largest Jaccard index, the first of equals."""
    tasks = [task for task in masks["tasks"] if task in members]
    places = {task: masks["tasks"].index(task) for task in tasks}
    pairs = [(a, b) for i, a in enumerate(tasks) for b in tasks[i + 1 :]]
    if not pairs:
        return None
    a, b = max(pairs, key=lambda two: masks["jaccard"][places[two[0]]][places[two[1]]] or 0.0)
    return members[a], members[b]


def _check(what: str, name: str, known: Iterable[str]) -> None:
    names = list(known)
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    raise BadInput(
        f"unknown {what}: {name!r}",
        expected=", ".join(names),
        found=name,
        hint=f"did you mean {near[0]!r}?" if near else "choose one of these",
    )


def _checked_densities(densities: Iterable[float]) -> tuple[float, ...]:
    found = tuple(sorted(set(densities)))
    for density in found:
        if not 0 < density <= 1:
            raise BadInput(
                "a density cannot be used",
                expected="fractions above 0 and up to 1, such as 0.01,0.1,1",
                found=density,
                hint="correct --densities",
            )
    return found


def _pictures(found: Mapping[str, Any]) -> dict[str, bytes]:
    drawn: list[Plot | None] = []
    for task, measured in found["tasks"].items():
        with drawing("grafted"):
            drawn.append(curves_plot(task, measured))
    if found["pair"] is not None:
        with drawing("conflict"):
            drawn.append(conflict_plot(found["pair"]))
    for make in _MASK_PLOTS:
        with drawing("masks"):
            drawn.append(make(found["masks"]))
    return {f"{plot.name}.png": to_png(plot) for plot in drawn if plot is not None}


def _metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """What MLflow charts: the value of each graft, by task, localizer and density."""
    return {
        f"{task}/{name}/{point['density']:g}": point["value"]
        for task, measured in found["tasks"].items()
        for name, one in measured["curves"].items()
        for point in one["points"]
    }
