"""Compare merge methods on the members of a line: same models, same data, one table.

    members --> per method: a sparse delta or the whole task vector of each member
            --> tune on validation rows (on request) --> stitch --> evaluate --> table

Methods that give one model for all tasks and methods that give one specialist per task stand in
two tables: a specialist is only useful to a caller who knows the task.

The line does not change. Results are stored under a digest of their inputs, so that nothing is
computed twice; `restitch gc` removes results that no version refers to.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from restitch.flows.promotion.candidates import measure
from restitch.flows.promotion.snapshot import Snapshot, take_snapshot
from restitch.flows.promotion.what_if import WhatIf, prepare
from restitch.flows.research.experts import SpecialistMeasurements, measure_specialists
from restitch.flows.research.study_output import StudyOutcome, publish_study
from restitch.merging.errors import BadInput
from restitch.merging.localize.subspace import NAME as SUBSPACE
from restitch.merging.methods.registry import Method, get_method, method_names
from restitch.registry.ledger.records import mean_of
from restitch.registry.mlflow.projection import StudyPart
from restitch.registry.specs.metric import METRICS, mean_share
from restitch.tasks.merge import make_recipe, stitch
from restitch.tasks.report.drawing import drawing, to_png
from restitch.tasks.report.plots import methods_plot
from restitch.tasks.research.experts import make_experts
from restitch.tasks.runtime.console import say
from restitch.tasks.runtime.engine import flow
from restitch.tasks.runtime.memory import memory_added
from restitch.tasks.runtime.refs import WeightsRef
from restitch.tasks.runtime.workspace import workspace
from restitch.tasks.statistics import lacks_rows


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """A method, its cost, and the accuracy that it reaches.

    Attributes:
        tuned: the outcome of tuning; None without tuning.
        needs: the method's input for each member, in words.
        statistics: the digests of the statistics, by name.
        localize: the settings of the masks.
        stored_bytes: the size of the deltas and statistics.
        seconds: the duration of the merge; None if its result was in the store, like `memory`.
    """

    method: str
    version: int
    source: str
    settings: dict[str, Any]
    tuned: dict[str, Any] | None
    needs: str
    statistics: dict[str, str]
    statistics_seconds: float
    localize: dict[str, Any]
    stored_bytes: int
    results: dict[str, dict[str, Any]]
    mean_accuracy: float | None
    mean_normalized: float | None
    recipe: str
    seconds: float | None
    memory: int | None


@dataclass(frozen=True, kw_only=True)
class MergedResult(MethodResult):
    """A method that gives one model for all tasks."""

    retention: dict[str, Any] | None
    patch: str
    patch_bytes: int


@dataclass(frozen=True, kw_only=True)
class SpecialistsResult(SpecialistMeasurements, MethodResult):
    """A method that gives one specialist per task."""


@dataclass(frozen=True, kw_only=True)
class Comparison(StudyOutcome):
    """Methods on the members of a line.

    Attributes:
        methods: the methods that give one merged model, the best first.
        experts: the methods that give specialists, the best first.
        left_out: the methods that cannot run, with the tasks that have no train rows for them.
    """

    tuned: bool
    methods: tuple[MergedResult, ...]
    experts: tuple[SpecialistsResult, ...]
    left_out: dict[str, list[str]]


@flow("compare", "{line}")
def compare(
    line: str,
    methods: Sequence[str] = (),
    tuned: bool = False,
    out: str | None = None,
    settings: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> Comparison:
    """Merge a line's members by several methods and measure each result.

    Args:
        line: the line's name.
        methods: their names; all methods by default.
        tuned: choose each method's tunable setting on validation rows.
        out: a folder for `compare.json` and the plot.
        settings: of methods by name; by default the line's or the method's own.

    Raises:
        BadInput: there is no such method, or nothing to merge.
    """
    space = workspace()
    chosen = [get_method(name) for name in methods or method_names()]
    snapshot = take_snapshot(space.ledger(line))
    if not snapshot.members:
        raise BadInput(f"line {line} has no member to merge", hint="register models first")
    tasks = [member.spec for member in snapshot.members]
    lacking: dict[str, list[str]] = {}
    if not methods:
        lacking = {m.name: without for m in chosen if (without := lacks_rows(m, tasks))}
        chosen = [method for method in chosen if method.name not in lacking]
        for name, without in lacking.items():
            say(f"{line}: {name} is left out: no train rows for {', '.join(without)}")
    merged, experts = [], []
    for method in chosen:
        say(f"{line}: {method.name}")
        ready = prepare(
            snapshot.line_in_use,
            snapshot.members,
            method,
            tuned=tuned,
            settings=settings.get(method.name),
        )
        if method.kind == "merged":
            merged.append(_measure_merged(snapshot, ready, method))
        else:
            experts.append(_measure_specialists(ready, method))
    outcome = Comparison(
        line=line,
        members={m.task: m.version for m in snapshot.members},
        tuned=tuned,
        methods=tuple(sorted(merged, key=partial(_quality, value="merged"), reverse=True)),
        experts=tuple(sorted(experts, key=partial(_quality, value="expert"), reverse=True)),
        left_out=lacking,
    )
    artifacts = {}
    with drawing("methods"):
        plot = methods_plot(outcome.as_dict()["methods"])
        if plot is not None:
            artifacts["accuracy-against-retention.png"] = to_png(plot)
    publish_study(
        outcome,
        f"methods of {line} compared",
        out,
        name="compare",
        params={"members": outcome.members, "tuned": tuned, "left_out": lacking},
        metrics={},
        artifacts=artifacts,
        parts=[*map(_part, outcome.methods), *map(_part, outcome.experts)],
    )
    return outcome


def _quality(row: MethodResult, value: str) -> float:
    """The mean over the tasks, on the scale of `Metric.worth`."""
    known = [(METRICS[one["metric"]], one[value]) for one in row.results.values()]
    return mean_of(of.worth(one) for of, one in known if one is not None) or 0.0


def _describe(ready: WhatIf, method: Method) -> dict[str, Any]:
    """The fields of a result that do not depend on the method's kind."""
    deltas = "whole task vectors" if method.whole else "sparse deltas"
    if ready.line.spec.localize.mode == SUBSPACE:
        deltas = "subspaces"
    return {
        "method": method.name,
        "version": method.version,
        "source": method.source,
        "settings": dict(ready.line.spec.method.settings),
        "tuned": None if ready.choice is None else asdict(ready.choice),
        "needs": f"{deltas} and train rows" if method.needs else deltas,
        "statistics": {name: ref.blob for name, ref in ready.statistics.items()},
        "statistics_seconds": sum(ref.seconds or 0.0 for ref in ready.statistics.values()),
        "localize": ready.line.spec.localize.to_json(),
        "stored_bytes": ready.stored,
    }


def _measure_merged(snapshot: Snapshot, ready: WhatIf, method: Method) -> MergedResult:
    line, members = ready.line, ready.members
    with memory_added() as memory:
        patch = stitch(line, make_recipe(line, members))
    merged = WeightsRef("merged", patch.blob)
    results, retention = measure(line, snapshot.line_state, members, merged)
    return MergedResult(
        **_describe(ready, method),
        results={task: result.to_json() for task, result in results.items()},
        mean_accuracy=mean_share((result.metric, result.merged) for result in results.values()),
        mean_normalized=mean_of(result.normalized for result in results.values()),
        retention=None if retention is None else retention.to_json(),
        seconds=patch.seconds,
        memory=None if patch.seconds is None else memory.added,
        recipe=patch.recipe,
        patch=patch.blob,
        patch_bytes=patch.size,
    )


def _measure_specialists(ready: WhatIf, method: Method) -> SpecialistsResult:
    with memory_added() as memory:
        specialists = make_experts(ready.line, make_recipe(ready.line, ready.members))
    return SpecialistsResult(
        **_describe(ready, method),
        **vars(measure_specialists(ready.line, ready.members, specialists)),
        seconds=specialists.seconds,
        memory=None if specialists.seconds is None else memory.added,
    )


def _part(row: MergedResult | SpecialistsResult) -> StudyPart:
    """A method's run in MLflow, below that of the comparison.

    All methods have the names of a merged version's metrics, so that MLflow draws them together.
    """
    metrics = {
        "mean/accuracy": row.mean_accuracy,
        "mean/normalized": row.mean_normalized,
        "seconds/merge": row.seconds,
        "seconds/statistics": row.statistics_seconds,
        "bytes/memory": row.memory,
        "bytes/stored": row.stored_bytes,
    }
    if isinstance(row, SpecialistsResult):
        value, kind = "expert", "one model per task"
        metrics["bytes/all"] = row.bytes.all
    else:
        value, kind = "merged", "one model for all tasks"
        metrics["bytes/all"] = row.patch_bytes
        metrics["retention/ratio"] = (row.retention or {}).get("ratio")
    for task, result in row.results.items():
        metrics[f"task/{task}/{result['metric']}"] = result[value]
        metrics[f"task/{task}/normalized"] = result["normalized"]
    names = ("method", "version", "source", "needs", "tuned", "localize", "recipe")
    params = {"kind": kind, **{name: getattr(row, name) for name in names}}
    params |= {f"settings.{name}": setting for name, setting in row.settings.items()}
    known = {name: float(one) for name, one in metrics.items() if one is not None}
    return StudyPart(row.method, params, known)
