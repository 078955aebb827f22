"""Compare merge methods on the members of a line: same models, same data, one table.

    members --> per method: what it needs of each (a sparse delta, or its whole task vector)
            --> tune on validation rows, where that is asked for --> stitch --> evaluate --> table

Methods with one model for all tasks and those with one for each (`experts`) stand in two tables:
the second kind must be told which task is asked.

Nothing of the line changes. What a method needs is localized once and kept, like everything else
that is made here, under the key of all that it depends on; `restitch gc` removes what no version
refers to.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from restitch.flows.promotion.candidates import measure_member, measure_retention
from restitch.flows.promotion.snapshot import Snapshot, take_snapshot
from restitch.flows.promotion.what_if import Trial, prepare
from restitch.flows.research.experts import measure_experts
from restitch.flows.research.studies import log_study, write_study
from restitch.merging.digests import canonical_json
from restitch.merging.errors import BadInput
from restitch.merging.methods.registry import KINDS, Method, get_method, method_names
from restitch.registry.ledger.records import mean_of
from restitch.tasks.merge import make_recipe, stitch
from restitch.tasks.report.drawing import drawing, to_png
from restitch.tasks.report.method_plots import methods_plot
from restitch.tasks.research.experts import make_experts
from restitch.tasks.runtime.console import say
from restitch.tasks.runtime.engine import flow
from restitch.tasks.runtime.memory import memory_added
from restitch.tasks.runtime.refs import WeightsRef
from restitch.tasks.runtime.workspace import actor, workspace
from restitch.tasks.statistics import lacks_rows


@flow("compare", "{line}")
def compare(
    line: str, methods: Sequence[str] = (), tuned: bool = False, out: str | None = None
) -> dict[str, Any]:
    """Merge a line's members by several methods and measure each.

    Args:
        line: its name.
        methods: which; all by default.
        tuned: choose the setting that each method tunes on validation rows.
        out: a folder for `compare.json` and the plot.

    Raises:
        BadInput: there is no such method, or nothing to merge.
    """
    space = workspace()
    chosen = [get_method(name) for name in methods or method_names()]
    snapshot = take_snapshot(space.ledger(line))
    if not snapshot.members:
        raise BadInput(f"line {line} has no member to merge", hint="register models first")
    tasks = [member.spec for member in snapshot.members]
    lacking = {method.name: lacks_rows(method, tasks) for method in chosen}
    if not methods:
        chosen = [method for method in chosen if not lacking[method.name]]
        for name, without in lacking.items():
            if without:
                say(f"{line}: {name} is left out: no train rows for {', '.join(without)}")
    rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for method in chosen:
        say(f"{line}: {method.name}")
        measure = _measure if method.kind == "merged" else _measure_experts
        rows[method.kind].append(measure(snapshot, method, tuned))
    for some in rows.values():
        some.sort(key=lambda row: -(row["mean_accuracy"] or 0.0))
    found: dict[str, Any] = {
        "line": line,
        "members": {m.task: m.version for m in snapshot.members},
        "tuned": tuned,
        "methods": rows["merged"],
        "experts": rows["experts"],
        "left_out": {} if methods else {name: one for name, one in lacking.items() if one},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "actor": actor(),
    }
    artifacts = {"compare.json": canonical_json(found)}
    with drawing("methods"):
        plot = methods_plot(rows["merged"])
        if plot is not None:
            artifacts["accuracy-against-retention.png"] = to_png(plot)
    write_study(out, artifacts)
    both = [*rows["merged"], *rows["experts"]]
    params = {f"{row['method']}.settings": row["settings"] for row in both}
    params |= {"members": found["members"], "tuned": tuned}
    log_study(found, f"methods of {line} compared", params, _metrics(both), artifacts)
    return found


def _told(ready: Trial, method: Method) -> dict[str, Any]:
    """What is said of a method of either kind."""
    return {
        "method": method.name,
        "version": method.version,
        "source": method.source,
        "settings": dict(ready.line.spec.method.settings),
        "tuned": None if ready.choice is None else ready.choice.as_dict(),
        "needs": _needs(method),
        "statistics": {name: found.blob for name, found in ready.statistics.items()},
        "statistics_seconds": sum(found.seconds or 0.0 for found in ready.statistics.values()),
        "localize": ready.line.spec.localize.to_json(),
        "stored_bytes": ready.stored,
    }


def _needs(method: Method) -> str:
    """What a method needs of each member, for readers."""
    deltas = "whole task vectors" if method.whole else "sparse deltas"
    return f"{deltas} and train rows" if method.needs else deltas


def _measure(snapshot: Snapshot, method: Method, tuned: bool) -> dict[str, Any]:
    ready = prepare(snapshot.line_in_use, snapshot.members, method, tuned=tuned)
    line, members = ready.line, ready.members
    with memory_added() as memory:
        patch = stitch(line, make_recipe(line, members))
    merged = WeightsRef("merged", patch.blob)
    results = {m.task: measure_member(line, m, merged) for m in members}
    retention = measure_retention(line, snapshot.line_state, merged)
    return {
        **_told(ready, method),
        "results": {task: result.to_json() for task, result in results.items()},
        "mean_accuracy": mean_of(result.merged for result in results.values()),
        "mean_normalized": mean_of(result.normalized for result in results.values()),
        "retention": None if retention is None else retention.to_json(),
        "seconds": patch.seconds,
        "memory": None if patch.seconds is None else memory.added,
        "recipe": patch.recipe,
        "patch": patch.blob,
        "patch_bytes": patch.size,
    }


def _measure_experts(snapshot: Snapshot, method: Method, tuned: bool) -> dict[str, Any]:
    ready = prepare(snapshot.line_in_use, snapshot.members, method, tuned=tuned)
    with memory_added() as memory:
        experts = make_experts(ready.line, make_recipe(ready.line, ready.members))
    return {
        **_told(ready, method),
        **measure_experts(ready.line, ready.members, experts),
        "seconds": experts.seconds,
        "memory": None if experts.seconds is None else memory.added,
    }


def _metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What MLflow charts: each method's means, its retention, or what its experts take."""
    found: dict[str, float] = {}
    for row in rows:
        kept = row.get("retention") or {}
        for name, value in (
            ("mean_accuracy", row["mean_accuracy"]),
            ("mean_normalized", row["mean_normalized"]),
            ("retention", kept.get("ratio")),
            ("bytes", row.get("bytes", {}).get("all")),
        ):
            if value is not None:
                found[f"{row['method']}/{name}"] = value
    return found
