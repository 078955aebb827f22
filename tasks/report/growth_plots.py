"""Plots of accuracy as masks grow: of one member alone, and of two merged members.

Each function takes a result of `density_curves`, as in the JSON of `restitch analyze`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from restitch.tasks.report.drawing import COLOURS, Plot, axes_in
from restitch.tasks.report.numbers import number

# A localizer looks the same in every plot.
_MARKS = {
    "dataless": ("o", "blue"),
    "fisher": ("^", "green"),
    "distilled": ("D", "orange"),
    "trained": ("v", "red"),
    "random": ("s", "grey"),
}
_PAIR = (("o", "blue"), ("D", "orange"))


def curves_plot(task: str, measured: Mapping[str, Any]) -> Plot | None:
    """Grafted accuracy on a task against density, one line per localizer that was measured."""
    curves: Mapping[str, Any] = measured["curves"]
    if not curves:
        return None
    figure, axes = axes_in(2.6, left=0.62, top=0.2, bottom=0.5, right=1.5)
    for name, curve in curves.items():
        (shape, colour), points = _MARKS[name], curve["points"]
        x, y = [p["density"] for p in points], [p["value"] for p in points]
        _band(axes, x, [p["interval"] for p in points], colour)
        axes.plot(x, y, f"{shape}-", color=COLOURS[colour], label=name, **_THIN)
    own = measured["own"]
    if own["density"] is not None:
        at = {"color": COLOURS["ink"], "markersize": 9, "label": "in use"}
        axes.plot([own["density"]], [own["value"]], "*", linestyle="none", **at)
    for name, style in (("finetuned", "--"), ("base", ":")):
        if measured[name] is not None:
            line = {"linestyle": style, "linewidth": 1, "color": COLOURS["ink"]}
            axes.axhline(measured[name]["value"], label=name, **line)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.set(xlabel="numbers kept per weight", ylabel=f"grafted {measured['metric']}")
    _finish(axes)
    values = "; ".join(
        f"{name} from {number(float(c['points'][0]['value']))} "
        f"to {number(float(c['points'][-1]['value']))}"
        for name, c in curves.items()
    )
    return Plot(
        f"grafted-{task}",
        f"Grafted {measured['metric']} against density: {task}",
        f"The base with a growing share of the finetuned weights of {task}, by localizer, with "
        f"95 % intervals: {values}.",
        figure,
    )


def conflict_plot(pair: Mapping[str, Any]) -> Plot:
    """Accuracy of two merged members against the overlap of their masks, and of averaging."""
    figure, axes = axes_in(2.6, left=0.62, top=0.2, bottom=0.5, right=1.5)
    points = [point for point in pair["points"] if point["share"] is not None]
    shares = [point["share"] for point in points]
    for task, (shape, colour) in zip(pair["tasks"], _PAIR, strict=True):
        results = [point["tasks"][task] for point in points]
        _band(axes, shares, [result["interval"] for result in results], colour)
        y = [result["value"] for result in results]
        axes.plot(shares, y, f"{shape}-", color=COLOURS[colour], label=task, **_THIN)
    mean = [point["mean"] for point in points]
    axes.plot(shares, mean, "P-", color=COLOURS["ink"], label="mean", **_THIN)
    averaging = pair["averaging"]["mean"]
    axes.axhline(averaging, linestyle="--", linewidth=1, color=COLOURS["ink"], label="averaging")
    axes.set(xlabel="Jaccard index of the two masks", ylabel="accuracy of the merged model")
    _finish(axes)
    values = ", ".join(f"{number(float(p['mean']))} at {number(float(p['share']))}" for p in points)
    return Plot(
        "conflict",
        f"Merged accuracy against overlap of the masks: {' and '.join(pair['tasks'])}",
        f"Mean accuracy of both tasks by the Jaccard index of the masks: {values}; averaging of "
        f"whole task vectors: {number(float(averaging))}.",
        figure,
    )


_THIN: dict[str, Any] = {"linewidth": 1.2, "markersize": 4}


def _band(
    axes: Any, x: Sequence[float], intervals: Sequence[Mapping[str, float]], colour: str
) -> None:
    low, high = [i["low"] for i in intervals], [i["high"] for i in intervals]
    axes.fill_between(x, low, high, color=COLOURS[colour], alpha=0.12, linewidth=0)


def _finish(axes: Any) -> None:
    axes.margins(0.05)
    axes.grid()
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), handletextpad=0.4)
