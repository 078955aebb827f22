"""Plots of results by task, version and method; `mask_plots` has those of the masks.

Each function takes plain JSON values as the commands print them, and makes one `Plot` with a
description in words. Values that were not measured are left out.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from restitch.registry.specs.metric import METRICS
from restitch.tasks.report.drawing import COLOURS, Plot, axes_in, label, room
from restitch.tasks.report.numbers import number

# The weights that are compared on a task, in the order of their marks, with colour and shape.
SERIES = {
    "base": ("grey", "s"),
    "finetuned": ("blue", "D"),
    "grafted": ("orange", "^"),
    "merged": ("green", "o"),
    "expert": ("red", "v"),
}
_MOST_IN_WORDS = 12
# The marks of methods.
_MARKS = list(product(("o", "D", "s", "^", "v", "P"), ("blue", "orange", "green", "red", "sky")))


def results_plot(results: Mapping[str, Any]) -> Plot | None:
    """Values of base, finetuned, grafted and merged weights on every task, with intervals."""
    return _of_tasks("results", "Results by task before and after merging", results, "merged")


def experts_plot(experts: Mapping[str, Any], merged: Mapping[str, Any]) -> Plot | None:
    """Values of base, finetuned, merged model and specialist on every task, with intervals."""
    results = {}
    for task, one in experts.items():
        spans = {**one["intervals"], "expert": one["interval"]}
        of_merged = {name: merged.get(task, {}).get(name) for name in ("merged", "interval")}
        results[task] = {**one, "grafted": None, **of_merged, "intervals": spans}
    return _of_tasks("experts", "Specialists and the merged model", results, "expert")


def _of_tasks(name: str, title: str, results: Mapping[str, Any], main: str) -> Plot | None:
    """Values of every task; the description lists those of the main series."""
    # A perplexity has another scale; the table has it.
    results = {
        task: result
        for task, result in results.items()
        if METRICS[result.get("metric") or "accuracy"].is_share
    }
    known = [n for n in SERIES if any(r.get(n) is not None for r in results.values())]
    if not known:
        return None
    tasks = list(results)
    row = 0.34 if len(tasks) <= 20 else 0.26
    figure, axes = axes_in(row * len(tasks), left=room(tasks), top=0.36, bottom=0.5)
    for index in range(0, len(tasks), 2):
        axes.axhspan(index - 0.5, index + 0.5, color=COLOURS["stripe"], linewidth=0, zorder=0)
    for index, one in enumerate(known):
        offset = (index - (len(known) - 1) / 2) * 0.8 / len(known)
        points = [(i, results[t]) for i, t in enumerate(tasks) if results[t].get(one) is not None]
        _marks(axes, one, [(i + offset, r[one], _interval_of(r, one)) for i, r in points])
    axes.set_yticks(range(len(tasks)), [label(task) for task in tasks])
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    metrics = sorted({str(r.get("metric") or "accuracy") for r in results.values()})
    axes.set_xlabel(" or ".join(metrics))
    # In this order: a legend would sort by the kind of mark.
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(known), handletextpad=0.2)
    values = [(t, r[main]) for t, r in results.items() if r.get(main) is not None]
    return Plot(
        name,
        title,
        f"For {len(tasks)} tasks: {', '.join(known)}, with 95 % intervals if known. "
        f"{main.capitalize()}: {_in_words(values)}. The table below has all values.",
        figure,
    )


def _marks(
    axes: Any, name: str, marks: Sequence[tuple[float, float, tuple[float, float] | None]]
) -> None:
    colour, shape = COLOURS[SERIES[name][0]], SERIES[name][1]
    ranged = [(y, span) for y, _, span in marks if span is not None]
    axes.hlines(
        [y for y, _ in ranged],
        [span[0] for _, span in ranged],
        [span[1] for _, span in ranged],
        color=colour,
        linewidth=1.3,
        alpha=0.75,
    )
    y, x = [mark[0] for mark in marks], [mark[1] for mark in marks]
    axes.plot(x, y, shape, color=colour, markersize=5 if name == "merged" else 4, label=name)


def _interval_of(result: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    intervals = result.get("intervals") or {}
    interval = result.get("interval") if name == "merged" else intervals.get(name)
    return None if interval is None else (interval["low"], interval["high"])


def retention_plot(
    version: Mapping[str, Any], versions: Sequence[Mapping[str, Any]]
) -> Plot | None:
    """Retention by version, with the interval of the reported version."""
    points = _with(versions, "retention")
    if not points:
        return None
    figure, axes = axes_in(2.1, left=0.62, top=0.36, bottom=0.5)
    axes.axhline(1.0, color=COLOURS["grey"], linewidth=1, linestyle=(0, (4, 3)))
    # The line connects the versions that no gate blocked.
    good = [v for v in points if v["passed"]]
    x, y = [v["version"] for v in good], [v["retention"] for v in good]
    axes.plot(x, y, "-", color=COLOURS["sky"], linewidth=1.2)
    span = (version.get("retention") or {}).get("ratio_interval")
    if span is not None:
        at = [version["version"]]
        axes.vlines(at, [span["low"]], [span["high"]], color=COLOURS["green"], linewidth=1.5)
    _mark_versions(figure, axes, version["version"], points, "version", "retention")
    axes.set(xlabel="version", ylabel="retention (base: 1)")
    axes.grid(axis="y")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _widen(axes)
    numbers = [v["version"] for v in points]
    margin = max(0.6, 0.1 * (max(numbers) - min(numbers)))
    axes.set_xlim(min(numbers) - margin, max(numbers) + margin)
    words = [(f"version {v['version']}", v["retention"]) for v in points]
    return Plot(
        "retention",
        "Retention by version",
        f"Retention of {len(points)} versions, oldest first: "
        f"{_in_words(words)}. The dashed line is the base.",
        figure,
    )


def tradeoff_plot(version: Mapping[str, Any], versions: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Mean accuracy over the tasks against retention, one mark per version."""
    points = _with(versions, "retention", "mean_accuracy")
    if not points:
        return None
    figure, axes = axes_in(2.1, left=0.62, top=0.36, bottom=0.5)
    _mark_versions(figure, axes, version["version"], points, "retention", "mean_accuracy")
    axes.set(xlabel="retention (base: 1)", ylabel="mean accuracy over the tasks")
    axes.grid()
    _widen(axes)
    words = [(f"version {v['version']}", v["mean_accuracy"]) for v in points]
    return Plot(
        "tradeoff",
        "Accuracy against retention by version",
        f"Mean accuracy over the tasks of each of {len(points)} versions against its retention. "
        f"Mean accuracy: {_in_words(words)}.",
        figure,
    )


def methods_plot(rows: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Mean accuracy over the tasks against retention, one mark per method with both.

    The rows are those of `restitch compare --json`, best first. There is no retention where the
    base has no right answer.
    """
    known = [
        row
        for row in rows
        if row["mean_accuracy"] is not None and (row["retention"] or {}).get("ratio") is not None
    ]
    if not known:
        return None
    figure, axes = axes_in(2.6, left=0.62, top=0.2, bottom=0.5, right=1.6)
    for index, row in enumerate(known):
        shape, colour = _MARKS[index % len(_MARKS)]
        retention, accuracy = row["retention"]["ratio"], row["mean_accuracy"]
        span = row["retention"].get("ratio_interval")
        if span is not None:
            at = [accuracy]
            axes.hlines(at, [span["low"]], [span["high"]], color=COLOURS[colour], linewidth=1)
        style = {"color": COLOURS[colour], "markersize": 6, "label": row["method"]}
        axes.plot([retention], [accuracy], shape, **style)
    axes.set(xlabel="retention (base: 1)", ylabel="mean accuracy over the tasks")
    axes.margins(0.12)
    axes.grid()
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), handletextpad=0.2)
    values = ", ".join(
        f"{row['method']} {number(row['mean_accuracy'])} at {number(row['retention']['ratio'])}"
        for row in known
    )
    return Plot(
        "methods",
        "Accuracy against retention by method",
        f"Mean accuracy and retention of {len(known)} methods: {values}.",
        figure,
    )


def _mark_versions(
    figure: Any, axes: Any, this: int, points: Sequence[Mapping[str, Any]], x: str, y: str
) -> None:
    """Mark versions by the outcome of their gates; label this one, champion and candidate."""
    kinds = (
        ("not blocked by a gate", "blue", "o", [p for p in points if p["passed"]]),
        ("blocked by a gate", "red", "X", [p for p in points if not p["passed"]]),
        ("this version", "green", "D", [p for p in points if p["version"] == this]),
    )
    for name, colour, shape, chosen in kinds:
        if chosen:
            own = {"markersize": 8 if name == "this version" else 5, "zorder": 3}
            at = [p[x] for p in chosen], [p[y] for p in chosen]
            axes.plot(*at, shape, color=COLOURS[colour], label=name, **own)
    for point in points:
        names = [str(point["role"])] if point["role"] else []
        if point["version"] == this or names:
            text = " ".join([str(point["version"]), *names])
            axes.annotate(
                text,
                (point[x], point[y]),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
                zorder=4,
            )
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="upper center", ncols=3, handletextpad=0.2)


def _widen(axes: Any) -> None:
    # Leave room for labels next to the outermost marks; a single version has no extent.
    axes.margins(x=0.12, y=0.18)
    for low, high, widen in (
        (*axes.get_xlim(), axes.set_xlim),
        (*axes.get_ylim(), axes.set_ylim),
    ):
        if high - low < 1e-3:
            widen(low - 0.01, high + 0.01)


def _with(versions: Sequence[Mapping[str, Any]], *names: str) -> list[Mapping[str, Any]]:
    """The versions that have all of these values, oldest first."""
    return [v for v in reversed(versions) if all(v.get(name) is not None for name in names)]


def _in_words(values: Sequence[tuple[str, float]]) -> str:
    words = [f"{name} {number(value)}" for name, value in values[:_MOST_IN_WORDS]]
    rest = len(values) - len(words)
    return ", ".join(words) + (f" and {rest} more" if rest else "")
