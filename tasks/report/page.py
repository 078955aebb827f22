"""The page: one HTML file that needs nothing else, no network and no script.

`render` lays out what it is given. A number on the page is the number in the JSON (see
`restitch.tasks.report.numbers`); what is missing is a dash. Everything that comes from others is escaped:
names, reasons and addresses are text, never markup, and the page's own policy forbids scripts and
every request.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from restitch.tasks.report.drawing import Plot, drawing, to_png, to_svg
from restitch.tasks.report.mask_plots import (
    components_plot,
    cosine_plot,
    jaccard_plot,
    layers_plot,
    owners_plot,
)
from restitch.tasks.report.numbers import Numbers
from restitch.tasks.report.plots import results_plot, retention_plot, tradeoff_plot

# Of a line that is remerged every night for years the page lists the newest.
MOST_VERSIONS = 60
MOST_PAIRS = 12

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class ReportInput:
    """What is known of a merged version, as plain JSON values.

    Attributes:
        version: as `restitch show LINE VERSION --json` prints it.
        versions: the list of `restitch history LINE --versions --json`, newest first.
        changes: as `restitch diff LINE A B --json` prints it, B being this version and A the
            champion before; None where there was none.
        acts: those of `restitch history LINE --json` that are about this version.
        analysis: as the step `analyze` returns it; None where it was not made.
    """

    version: dict[str, Any]
    versions: Sequence[dict[str, Any]]
    changes: dict[str, Any] | None
    acts: Sequence[dict[str, Any]]
    analysis: dict[str, Any] | None


@dataclass(frozen=True)
class Report:
    """A rendered report.

    Attributes:
        html: the page.
        plots: its plots as pictures on white, `<name>.png`.
    """

    html: str
    plots: dict[str, bytes]


def render(found: ReportInput) -> Report:
    """Render the report of a merged version."""
    plots = _plots(found)
    values = {
        **found.version,
        "versions": list(found.versions),
        "changes": found.changes,
        "acts": list(found.acts),
        "analysis": found.analysis,
    }
    html = _template().render(
        n=Numbers(values),
        v=found.version,
        versions=found.versions[:MOST_VERSIONS],
        all_versions=len(found.versions),
        changes=found.changes,
        by_verdict=_by_verdict(found.changes),
        acts=found.acts,
        analysis=found.analysis,
        whole=_all_is_kept(found.analysis),
        pairs=_closest_pairs(found.analysis),
        plots={plot.name: plot for plot in plots},
        svg=to_svg,
        recipe=_as_json(found.version["recipe"], indent=2),
    )
    return Report(html, {f"{plot.name}.png": to_png(plot) for plot in plots})


def _plots(found: ReportInput) -> list[Plot]:
    version, versions, analysis = found.version, found.versions, found.analysis
    makers: list[tuple[str, Callable[[], Plot | None]]] = [
        ("results", lambda: results_plot(version["results"])),
        ("retention", lambda: retention_plot(version, versions)),
        ("tradeoff", lambda: tradeoff_plot(version, versions)),
    ]
    if analysis is not None:
        makers.append(("cosine", lambda: cosine_plot(analysis)))
    if analysis is not None and not _all_is_kept(analysis):
        makers += [
            ("jaccard", lambda: jaccard_plot(analysis)),
            ("layers", lambda: layers_plot(analysis)),
            ("components", lambda: components_plot(analysis)),
            ("owners", lambda: owners_plot(analysis)),
        ]
    made = []
    for name, make in makers:
        with drawing(name):
            made.append(make())
    return [plot for plot in made if plot is not None]


def _by_verdict(changes: Mapping[str, Any] | None) -> dict[str, list[tuple[int, str]]]:
    """The compared tasks with their places in the list, by what became of them."""
    grouped: dict[str, list[tuple[int, str]]] = {}
    for place, row in enumerate([] if changes is None else changes["results"]):
        grouped.setdefault(row["verdict"], []).append((place, row["task"]))
    return grouped


def _all_is_kept(analysis: Mapping[str, Any] | None) -> bool:
    """Whether the members are whole task vectors, which leave nothing to see of masks."""
    if analysis is None:
        return False
    sizes, kept = analysis["coordinates"], analysis["kept"].values()
    return bool(kept) and all(one == sizes for one in kept)


def _closest_pairs(analysis: Mapping[str, Any] | None) -> list[tuple[int, int]]:
    """The pairs of members whose masks overlap most, by their places."""
    if analysis is None:
        return []
    jaccard = analysis["jaccard"]
    pairs = [(i, j) for j in range(len(jaccard)) for i in range(j) if jaccard[i][j] is not None]
    return sorted(pairs, key=lambda pair: -jaccard[pair[0]][pair[1]])[:MOST_PAIRS]


def _as_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, sort_keys=True, ensure_ascii=False)


@cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "short": lambda digest: str(digest)[:12],
        "moment": lambda time: str(time)[:19].replace("T", " "),
        "as_json": _as_json,
        "named": lambda names: [(name, "number") for name in names],
    }
    return environment.get_template("page.html.j2")
