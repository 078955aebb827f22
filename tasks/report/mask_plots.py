"""Plots of masks: their overlaps, and their shares by layer and component.

Each function takes the analysis of a merged version (see `mask_analysis`) and makes one `Plot`.
Heat maps vary opacity over the page's background, so they suit light and dark mode.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from restitch.tasks.report.drawing import COLOURS, WIDTH, Plot, axes_in, label, room
from restitch.tasks.report.numbers import number

EVERYTHING = "all weights"
# The measure of similarity that only an analysis of subspaces has.
SUBSPACES = "overlap"

_BLUE, _RED = (0.0, 0.36, 0.62), (0.72, 0.24, 0.04)
_PARTS = ("blue", "orange", "green", "pink", "sky", "grey")
_MOST_WITH_NUMBERS = 8  # with more members, cells are too small for numbers
_MOST_IN_WIDTH = 24  # columns that fit the common width; more make the plot wider
_SCALE_ROOM = 2.6  # inches


def jaccard_plot(analysis: Mapping[str, Any]) -> Plot | None:
    """The Jaccard index of each pair of masks."""
    description = "Common coordinates of two masks over all of theirs"
    return _pairs_plot(analysis, "jaccard", "Jaccard index of the masks", description)


def overlap_plot(analysis: Mapping[str, Any]) -> Plot | None:
    """The overlap of each pair of subspaces."""
    description = "Mean squared cosine of the principal angles between two subspaces"
    return _pairs_plot(analysis, "overlap", "Overlap of the subspaces", description)


def cosine_plot(analysis: Mapping[str, Any]) -> Plot | None:
    """The cosine similarity of each pair of masked task vectors."""
    what = "task vectors" if SUBSPACES in analysis else "masked task vectors"
    title = f"Cosine similarity of the {what}"
    return _pairs_plot(analysis, "cosine", title, f"Cosine similarity of two {what}")


def _pairs_plot(
    analysis: Mapping[str, Any], name: str, title: str, description: str
) -> Plot | None:
    pairs = pairs_of(analysis.get(name, ()))
    if not pairs:
        return None
    (i, j, high), (*_, low) = pairs[0], pairs[-1]
    first, second = label(analysis["tasks"][j]), label(analysis["tasks"][i])
    words = (
        f"{description}, for {len(pairs)} pairs of members: from {number(low)} to {number(high)} "
        f"({first} and {second}), median {number(pairs[len(pairs) // 2][2])}."
    )
    highest = max(abs(value) for *_, value in pairs) or 1.0
    return Plot(name, title, words, _square(analysis, name, highest))


def layers_plot(analysis: Mapping[str, Any]) -> Plot | None:
    """The share of every mask in every layer, compared with that of all weights."""
    shares = _shares(analysis, "by_layer")
    if not shares:
        return None
    layers, what = analysis["places"]["layers"], kept(analysis)
    rows = [[share.get(layer, 0.0) for layer in layers] for share in shares.values()]
    highest = max(value for row in rows for value in row)
    return Plot(
        "layers",
        f"{what.capitalize()} by layer",
        f"The share of each of {len(rows) - 1} {what} in each of {len(layers)} layers, and the "
        f"share of all weights in the tensors that {what} touch. The largest share is "
        f"{number(highest)}.",
        _heat_map(rows, list(shares), layers, highest, cell=0.26, numbers=False),
    )


def components_plot(analysis: Mapping[str, Any]) -> Plot | None:
    """The share of every mask in every component, compared with that of all weights."""
    shares = _shares(analysis, "by_component")
    if not shares:
        return None
    parts, names = analysis["places"]["components"], list(shares)
    what = kept(analysis)
    figure, axes = axes_in(len(names) * 0.26, left=room(names), right=0.2, top=0.55, bottom=0.5)
    start = [0.0] * len(names)
    for part, colour in zip(parts, _PARTS, strict=False):
        widths = [share.get(part, 0.0) for share in shares.values()]
        axes.barh(range(len(names)), widths, 0.72, left=start, color=COLOURS[colour], label=part)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    axes.set_yticks(range(len(names)), [label(name) for name in names])
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(0, 1), ylim=(len(names) - 0.5, -0.5), xlabel=f"share of the {what[:-1]}")
    handles, labels = axes.get_legend_handles_labels()
    columns = len(parts) if len(parts) <= 4 else 3
    figure.legend(handles, labels, loc="upper center", ncols=columns, handlelength=1)
    means = {
        part: sum(share.get(part, 0.0) for name, share in shares.items() if name != EVERYTHING)
        / (len(shares) - 1)
        for part in parts
    }
    return Plot(
        "components",
        f"{what.capitalize()} by component",
        f"The share of each of {len(names) - 1} {what} by component, and the share of all weights "
        f"in the tensors that {what} touch. Mean over the {what}: "
        + ", ".join(f"{part} {number(mean)}" for part, mean in means.items())
        + ".",
        figure,
    )


def owners_plot(analysis: Mapping[str, Any]) -> Plot | None:
    """The number of coordinates in exactly 1, 2, 3, ... masks."""
    from matplotlib.ticker import NullLocator

    owners = analysis.get("owners", ())
    if not sum(owners):
        return None
    # Counts of zero at the end are not drawn; a log scale could not show them.
    last = max(i for i, count in enumerate(owners) if count) + 1
    figure, axes = axes_in(1.9, left=1.05, top=0.3, bottom=0.5)
    places = list(range(1, last + 1))
    counts = owners[:last]
    axes.bar(places, counts, 0.75, color=COLOURS["sky"])
    smallest = min(count for count in counts if count)
    if max(counts) > 50 * smallest:
        axes.set_yscale("log")
        axes.set_ylim(smallest / 2, max(counts) * 3)
    else:
        axes.set_ylim(0, max(counts) * 1.15)
    axes.yaxis.set_major_formatter(lambda value, _: number(round(value)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlim(0.4, max(last, 2) + 0.6)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y")
    if last <= 6:
        for place, count in zip(places, counts, strict=True):
            axes.annotate(
                number(count),
                (place, max(count, smallest)),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
            )
    axes.set(xlabel="number of masks that select a coordinate", ylabel="coordinates")
    words = ", ".join(f"{masks}: {number(count)}" for masks, count in enumerate(owners[:12], 1))
    return Plot(
        "owners",
        "Coordinates by number of masks",
        f"Number of coordinates by how many masks select them. {words}"
        + (" and so on." if len(owners) > 12 else "."),
        figure,
    )


def similarity(analysis: Mapping[str, Any]) -> Sequence[Sequence[float | None]]:
    """How much each pair of members has in common: overlap of subspaces, or Jaccard of masks."""
    found: Sequence[Sequence[float | None]] = analysis.get(SUBSPACES) or analysis["jaccard"]
    return found


def pairs_of(matrix: Sequence[Sequence[float | None]]) -> list[tuple[int, int, float]]:
    """The pairs of members that have a value, by their indices, largest value first."""
    pairs = [(i, j, value) for j, row in enumerate(matrix) for i, value in enumerate(row[:j])]
    known = [(i, j, value) for i, j, value in pairs if value is not None]
    return sorted(known, key=lambda pair: -pair[2])


def kept(analysis: Mapping[str, Any]) -> str:
    """What the members keep, in words."""
    return "subspaces" if SUBSPACES in analysis else "masks"


def _shares(analysis: Mapping[str, Any], group: str) -> dict[str, dict[str, float]]:
    places = analysis["places"][group]
    shares = {task: places["tasks"][task] for task in analysis["tasks"] if places["tasks"][task]}
    return {**shares, EVERYTHING: places["all"]} if shares else {}


def _square(analysis: Mapping[str, Any], name: str, highest: float) -> Any:
    tasks = analysis["tasks"]
    rows = [
        [None if i == j else value for j, value in enumerate(row)]
        for i, row in enumerate(analysis[name])
    ]
    cell = min(0.42, max(0.17, 3.1 / len(tasks)))
    few = len(tasks) <= _MOST_WITH_NUMBERS
    return _heat_map(rows, tasks, tasks, highest, cell=cell, numbers=few)


def _heat_map(
    rows: Sequence[Sequence[float | None]],
    down: Sequence[str],
    across: Sequence[str],
    highest: float,
    *,
    cell: float,
    numbers: bool,
) -> Any:
    """A heat map whose opacity is the magnitude: blue above zero, red below."""
    import numpy as np

    pixels = np.zeros((len(rows), len(across), 4))
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            if value is not None:
                strength = min(abs(value) / highest, 1.0) if highest else 0.0
                pixels[i, j] = (*(_BLUE if value >= 0 else _RED), 0.04 + 0.96 * strength)
    left, turned = room(down), any(len(name) > 3 for name in across)
    width = cell * len(across)
    if len(across) <= _MOST_IN_WIDTH:
        width = min(width, WIDTH - left - 0.14)
    figure, axes = axes_in(
        cell * len(rows),
        left=left,
        # Leave room for the scale above, even with few cells.
        right=max(0.14, _SCALE_ROOM - left - width),
        top=0.4,
        bottom=room(across) if turned else 0.3,
        width=width,
    )
    axes.imshow(pixels, interpolation="none", aspect="auto")
    axes.set_yticks(range(len(down)), [label(name) for name in down])
    shown = range(0, len(across), 1 if turned else max(1, round(0.24 * len(across) / width)))
    axes.set_xticks(shown, [label(across[i]) for i in shown], rotation=90 if turned else 0)
    axes.tick_params(length=0, labelcolor=COLOURS["ink"])
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    if numbers:
        _write_numbers(axes, rows, highest)
    _scale(figure, highest, signed=any(v is not None and v < 0 for row in rows for v in row))
    return figure


def _write_numbers(axes: Any, rows: Sequence[Sequence[float | None]], highest: float) -> None:
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            if value is not None:
                strong = abs(value) / highest > 0.5
                colour = "#ffffff" if strong else COLOURS["ink"]
                axes.text(j, i, number(value), ha="center", va="center", fontsize=6, color=colour)


def _scale(figure: Any, highest: float, *, signed: bool) -> None:
    """Draw the colour scale above the heat map."""
    import numpy as np

    width, height = figure.get_size_inches()
    lowest = -highest if signed else 0.0
    values = np.linspace(lowest, highest, 64)
    strip = np.zeros((1, 64, 4))
    strip[0, :, :3] = np.where(values[:, None] >= 0, _BLUE, _RED)
    strip[0, :, 3] = 0.04 + 0.96 * np.abs(values) / (highest or 1.0)
    place = ((width - 1.75) / width, 1 - 0.2 / height, 1.15 / width, 0.1 / height)
    axes = figure.add_axes(place)
    axes.imshow(strip, interpolation="none", aspect="auto")
    axes.set_axis_off()
    for text, at, side in ((number(lowest), -0.04, "right"), (number(highest), 1.04, "left")):
        axes.text(at, 0.5, text, ha=side, va="center", fontsize=7, transform=axes.transAxes)
