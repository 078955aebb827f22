"""Plots of studies: lines, points and bars of one measure against another, by series.

Each function takes the rows of a study's table, as in its CSV file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from restitch.tasks.report.drawing import COLOURS, Plot, axes_in, drawing, label, room
from restitch.tasks.report.numbers import number

_MARKS = (
    *(("o", "blue"), ("D", "orange"), ("s", "green"), ("^", "red"), ("v", "pink")),
    *(("P", "sky"), ("X", "grey")),
)
_THIN: dict[str, Any] = {"linewidth": 1.2, "markersize": 4}

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Axes:
    """The axes of a plot.

    Attributes:
        x: the column and the label of the x axis; likewise `y`.
        by: the column that separates series.
        log: whether x is logarithmic.
        whole: whether x has integer ticks.
    """

    x: tuple[str, str]
    y: tuple[str, str]
    by: str
    log: bool = False
    whole: bool = False
    percent: bool = False


def lines_plot(
    name: str, title: str, rows: Rows, axes: Axes, levels: Mapping[str, float] | None = None
) -> Plot:
    """One line per series, and a dashed line per level, which does not depend on x."""

    def draw(canvas: Any, some: Rows, shape: str, colour: str, series: str) -> None:
        x, y = [row[axes.x[0]] for row in some], [row[axes.y[0]] for row in some]
        canvas.plot(x, y, f"{shape}-", color=COLOURS[colour], label=label(series), **_THIN)

    return _plotted(name, title, rows, axes, draw, levels or {})


def points_plot(name: str, title: str, rows: Rows, axes: Axes) -> Plot:
    """One kind of mark per series."""

    def draw(canvas: Any, some: Rows, shape: str, colour: str, series: str) -> None:
        x, y = [row[axes.x[0]] for row in some], [row[axes.y[0]] for row in some]
        style = {"linestyle": "none", "color": COLOURS[colour], "markersize": 5}
        canvas.plot(x, y, shape, label=label(series), **style)

    return _plotted(name, title, rows, axes, draw, {})


def bars_plot(name: str, title: str, rows: Rows, axes: Axes) -> Plot:
    """Horizontal bars of length x with names y, grouped by series."""
    known = [row for row in rows if row[axes.x[0]] is not None]
    names = list(dict.fromkeys(str(row[axes.y[0]]) for row in known))
    series = list(dict.fromkeys(str(row[axes.by]) for row in known))
    groups: dict[str, list[str]] = {one: [] for one in names}
    for row in known:
        groups[str(row[axes.y[0]])].append(str(row[axes.by]))
    most = max((len(some) for some in groups.values()), default=1)
    with drawing(name):
        height = 0.25 + len(names) * max(0.2, 0.12 * most)
        right = 0.3 if len(series) == 1 else 0.2 + room(series)
        figure, canvas = axes_in(height, left=room(names), top=0.15, bottom=0.45, right=right)
        thick = 0.8 / most
        for place, one in enumerate(series):
            some = [row for row in known if str(row[axes.by]) == one]
            at = [_place(names, groups, str(row[axes.y[0]]), one, thick) for row in some]
            colour = COLOURS[_MARKS[place % len(_MARKS)][1]]
            widths = [row[axes.x[0]] for row in some]
            canvas.barh(at, widths, height=0.9 * thick, color=colour, label=label(one))
        canvas.set_yticks(range(len(names)), [label(one) for one in names])
        canvas.set_ylim(len(names) - 0.5, -0.5)
        canvas.tick_params(axis="y", length=0)
        canvas.grid(axis="x")
        _finish(canvas, axes, legend=len(series) > 1)
        canvas.set_ylabel("")
    return Plot(name, title, _description(title, known, axes), figure)


def _place(
    names: Sequence[str], groups: Mapping[str, Sequence[str]], name: str, series: str, thick: float
) -> float:
    """The position of a bar: the bars of a name are centred on it."""
    some = groups[name]
    return names.index(name) + (some.index(series) - (len(some) - 1) / 2) * thick


def _plotted(
    name: str,
    title: str,
    rows: Rows,
    axes: Axes,
    draw: Callable[[Any, Rows, str, str, str], None],
    levels: Mapping[str, float],
) -> Plot:
    known = [row for row in rows if row[axes.x[0]] is not None and row[axes.y[0]] is not None]
    series = list(dict.fromkeys(str(row[axes.by]) for row in known))
    with drawing(name):
        right = 0.35 + room([*series, *levels])
        figure, canvas = axes_in(2.6, left=0.78, top=0.2, bottom=0.5, right=right)
        for (shape, colour), one in zip(cycle(_MARKS), series, strict=False):
            draw(canvas, [row for row in known if str(row[axes.by]) == one], shape, colour, one)
        for (text, level), style in zip(levels.items(), cycle(("--", ":", "-.")), strict=False):
            line = {"linestyle": style, "linewidth": 1, "color": COLOURS["ink"]}
            canvas.axhline(level, label=label(text), **line)
        canvas.margins(0.05)
        canvas.grid()
        _finish(canvas, axes, legend=bool(series or levels))
        if axes.log:
            canvas.set_xticks(sorted({row[axes.x[0]] for row in known}))
        canvas.set_ylabel(axes.y[1])
    return Plot(name, title, _description(title, known, axes), figure)


def _finish(canvas: Any, axes: Axes, *, legend: bool) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator

    if axes.log:
        canvas.set_xscale("log")
        if not axes.percent:
            canvas.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        canvas.xaxis.set_minor_locator(NullLocator())
    if axes.percent:
        canvas.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    if axes.whole:
        canvas.xaxis.set_major_locator(MaxNLocator(integer=True))
    canvas.set_xlabel(axes.x[1])
    if legend:
        canvas.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), handletextpad=0.4)


def _description(title: str, rows: Rows, axes: Axes) -> str:
    values = "; ".join(
        f"{row[axes.by]}, {_short(row[axes.x[0]])}: {_short(row[axes.y[0]])}" for row in rows
    )
    return f"{title}: {values}."


def _short(value: Any) -> str:
    return number(value) if isinstance(value, int | float) else str(value)
