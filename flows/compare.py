"""Compare merge methods on the members of a line: same models, same data, one table.

    members --> per method: what it needs of each (a sparse delta, or its whole task vector)
            --> tune on validation rows, where that is asked for --> stitch --> evaluate --> table

Nothing of the line changes. What a method needs is localized once and kept, like everything else
that is made here, under the key of all that it depends on; `restitch gc` removes what no version
refers to. Methods that need whole task vectors get them, whatever the line keeps; the others get
the line's own deltas, or dataless ones where the line keeps everything.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from flows.candidates import measure_member, measure_retention
from flows.snapshot import Snapshot, take_snapshot
from flows.studies import log_study, write_study
from merging.digests import canonical_json
from merging.errors import BadInput
from merging.methods import Method, get_method, method_names, resolve_settings
from registry.head import Member
from registry.localize_spec import LocalizeSpec
from registry.specs import MethodSpec
from tasks.engine import flow
from tasks.localize import localize
from tasks.merge import make_recipe, stitch
from tasks.refs import LineRef, WeightsRef
from tasks.report.drawing import drawing, to_png
from tasks.report.method_plots import methods_plot
from tasks.reporting import say
from tasks.statistics import lacks_rows, statistics
from tasks.tune import tune
from tasks.workspace import actor, workspace

WHOLE = LocalizeSpec(mode="dataless", density=1.0)


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
    rows = []
    tasks = [member.spec for member in snapshot.members]
    lacking = {method.name: lacks_rows(method, tasks) for method in chosen}
    if not methods:
        chosen = [method for method in chosen if not lacking[method.name]]
        for name, without in lacking.items():
            if without:
                say(f"{line}: {name} is left out: no train rows for {', '.join(without)}")
    for method in chosen:
        say(f"{line}: {method.name}")
        rows.append(_measure(snapshot, method, tuned))
    rows.sort(key=lambda row: -(row["mean_accuracy"] or 0.0))
    found: dict[str, Any] = {
        "line": line,
        "members": {m.task: m.version for m in snapshot.members},
        "tuned": tuned,
        "methods": rows,
        "left_out": {} if methods else {name: one for name, one in lacking.items() if one},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "actor": actor(),
    }
    artifacts = {"compare.json": canonical_json(found)}
    with drawing("methods"):
        plot = methods_plot(rows)
        if plot is not None:
            artifacts["accuracy-against-retention.png"] = to_png(plot)
    write_study(out, artifacts)
    params = {f"{row['method']}.settings": row["settings"] for row in rows}
    params |= {"members": found["members"], "tuned": tuned}
    log_study(found, f"methods of {line} compared", params, _metrics(rows), artifacts)
    return found


def _measure(snapshot: Snapshot, method: Method, tuned: bool) -> dict[str, Any]:
    line = _line_with(snapshot, method)
    given = [_with_delta(line, member) for member in snapshot.members]
    members = tuple(member for member, _ in given)
    needed = statistics(line, members)
    choice = None
    if tuned and method.tunes is not None:
        choice = tune(line, members, method)
        settings = {**line.spec.method.settings, choice.setting: choice.value}
        line = LineRef(line.spec.with_method_settings(settings), line.base)
    patch = stitch(line, make_recipe(line, members))
    merged = WeightsRef("merged", patch.blob)
    results = {m.task: measure_member(line, m, merged) for m in members}
    retention = measure_retention(line, snapshot.head, merged)
    reached = [r.merged for r in results.values() if r.merged is not None]
    normalized = [r.normalized for r in results.values() if r.normalized is not None]
    return {
        "method": method.name,
        "version": method.version,
        "source": method.source,
        "settings": dict(line.spec.method.settings),
        "tuned": None if choice is None else choice.as_dict(),
        "needs": _needs(method),
        "statistics": {name: found.blob for name, found in needed.items()},
        "statistics_seconds": sum(found.seconds or 0.0 for found in needed.values()),
        "localize": line.spec.localize.to_json(),
        "results": {task: result.to_json() for task, result in results.items()},
        "mean_accuracy": sum(reached) / len(reached) if reached else None,
        "mean_normalized": sum(normalized) / len(normalized) if normalized else None,
        "retention": None if retention is None else retention.to_json(),
        "seconds": patch.seconds,
        "recipe": patch.recipe,
        "patch": patch.blob,
        "patch_bytes": patch.size,
        "stored_bytes": sum(size for _, size in given)
        + sum(found.size for found in needed.values()),
    }


def _needs(method: Method) -> str:
    """What a method needs of each member, for readers."""
    deltas = "whole task vectors" if method.whole else "sparse deltas"
    return f"{deltas} and train rows" if method.needs else deltas


def _line_with(snapshot: Snapshot, method: Method) -> LineRef:
    """The line as if a method were its own; its own settings where it is."""
    spec = snapshot.line_in_use.spec
    given = spec.method.settings if spec.method.name == method.name else {}
    settings = resolve_settings(method.name, given)
    keeps_all = get_method(spec.method.name).whole or spec.localize.density == 1.0
    kept_as_given = ("include", "exclude", "shots", "seed")
    among = {name: getattr(spec.localize, name) for name in kept_as_given}
    kept = spec.localize
    if method.whole:
        kept = WHOLE.model_copy(update=among)
    elif keeps_all:
        kept = LocalizeSpec(mode="dataless").model_copy(update=among)
    chosen = {"method": MethodSpec(name=method.name, settings=settings), "localize": kept}
    return LineRef(spec.model_copy(update=chosen), snapshot.head.base)


def _with_delta(line: LineRef, member: Member) -> tuple[Member, int]:
    """A member with the delta that a method needs of it, and the bytes of that."""
    delta = localize(line, member.spec, member.model.model)
    model = member.model.model_copy(update={"mask": delta.mask, "delta": delta.blob})
    return member.model_copy(update={"model": model}), delta.size


def _metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What MLflow charts: each method's means and its retention."""
    found: dict[str, float] = {}
    for row in rows:
        kept = row["retention"] or {}
        for name, value in (
            ("mean_accuracy", row["mean_accuracy"]),
            ("mean_normalized", row["mean_normalized"]),
            ("retention", kept.get("ratio")),
        ):
            if value is not None:
                found[f"{row['method']}/{name}"] = value
    return found
