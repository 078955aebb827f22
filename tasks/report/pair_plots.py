"""The plot of what pairs of members lose when merged, against each signal."""

from collections.abc import Mapping
from typing import Any

from restitch.tasks.report.drawing import COLOURS, WIDTH, Plot
from restitch.tasks.report.numbers import number

WORDS = {
    "shared": "shared coordinates",
    "sign_conflict": "sign conflict",
    "cosine": "cosine",
    "subspace_overlap": "subspace overlap",
    "gradient_alignment": "gradient alignment",
}
_HEIGHT = 1.9


def pairs_plot(found: Mapping[str, Any]) -> Plot | None:
    """The loss of each pair against each signal that was measured; None without pairs.

    Args:
        found: `pairs` and `correlations`, as in the JSON of `restitch analyze --pairs`.
    """
    drawn = [s for s in WORDS if any(pair[s] is not None for pair in found["pairs"])]
    if not drawn:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, _HEIGHT * ((len(drawn) + 1) // 2)), layout="constrained")
    grid = figure.subplots((len(drawn) + 1) // 2, 2, squeeze=False, sharey=True)
    cells = list(grid.flat)
    for axes, signal in zip(cells, drawn, strict=False):
        known = [pair for pair in found["pairs"] if pair[signal] is not None]
        x, y = [pair[signal] for pair in known], [pair["loss"] for pair in known]
        axes.plot(x, y, "o", color=COLOURS["blue"], markersize=4)
        axes.axhline(0.0, linewidth=0.8, color=COLOURS["grey"])
        axes.grid(visible=True)
        axes.locator_params(axis="x", nbins=4)
        axes.ticklabel_format(axis="x", useOffset=False)
        axes.set_xlabel(f"{WORDS[signal]}\n{_rho(found, signal)}")
    for axes in cells[len(drawn) :]:
        axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel("lost when merged")
    values = "; ".join(
        f"{' and '.join(pair['tasks'])} lose {number(float(pair['loss']))}"
        for pair in found["pairs"]
    )
    return Plot(
        "pairs",
        "What pairs of members lose when merged, against signals of conflict",
        f"One point for each pair: {values}. With the loss: "
        + ", ".join(f"{WORDS[signal]} {_rho(found, signal)}" for signal in drawn)
        + ".",
        figure,
    )


def _rho(found: Mapping[str, Any], signal: str) -> str:
    rho = found["correlations"][signal]["rho"]
    return "rank correlation " + ("-" if rho is None else f"{rho:+.2f}")
