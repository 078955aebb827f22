"""Render the report of a merged version as one HTML file, without scripts or network requests.

Every number on the page is marked with its path in the JSON (see `numbers`); missing values are
dashes. Names, reasons and addresses are escaped, and the page's content security policy forbids
scripts and all requests.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from restitch.registry.gates.gate import GateOutcome
from restitch.registry.ledger.measurements import Gain, keeps_subspace, shortfall
from restitch.registry.specs.metric import METRICS
from restitch.tasks.report.drawing import Plot, drawing, to_file, to_svg
from restitch.tasks.report.mask_plots import (
    SUBSPACES,
    components_plot,
    cosine_plot,
    jaccard_plot,
    kept,
    layers_plot,
    overlap_plot,
    owners_plot,
    pairs_of,
    similarity,
)
from restitch.tasks.report.numbers import Numbers
from restitch.tasks.report.pair_plots import WORDS, pairs_plot
from restitch.tasks.report.plots import results_plot, retention_plot, tradeoff_plot

# The page lists only the newest versions of a line.
MOST_VERSIONS = 60
MOST_PAIRS = 12

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class ReportInput:
    """The content of the report, as plain JSON values.

    Attributes:
        version: as `restitch show LINE VERSION --json` prints it.
        versions: the list of `restitch history LINE --versions --json`, newest first.
        changes: as `restitch diff LINE A B --json` prints it, where B is this version and A the
            previous champion; None without one.
        acts: the acts of `restitch history LINE --json` that are about this version.
        analysis: as the step `analyze` returns it; None if it was not made.
        pairs: as the step `measure_pairs` returns it; None if it was not made.
    """

    version: dict[str, Any]
    versions: Sequence[dict[str, Any]]
    changes: dict[str, Any] | None
    acts: Sequence[dict[str, Any]]
    analysis: dict[str, Any] | None
    pairs: dict[str, Any] | None = None


@dataclass(frozen=True)
class Report:
    """A rendered report: the page, and its plots as SVG files on white, by file name."""

    html: str
    plots: dict[str, bytes]


def render(content: ReportInput) -> Report:
    """Render the report of a merged version."""
    plots = _plots(content)
    drawn = {plot.name: to_svg(plot) for plot in plots}
    values = {
        **content.version,
        "versions": list(content.versions),
        "changes": content.changes,
        "acts": list(content.acts),
        "analysis": content.analysis,
        "pairs": content.pairs,
    }
    html = _template().render(
        n=Numbers(values),
        v=content.version,
        versions=content.versions[:MOST_VERSIONS],
        all_versions=len(content.versions),
        changes=content.changes,
        by_verdict=_by_verdict(content.changes),
        acts=content.acts,
        analysis=content.analysis,
        whole=_all_is_kept(content.analysis),
        subspaces=content.analysis is not None and SUBSPACES in content.analysis,
        of_subspaces=_keeps_subspaces(content.version["members"]),
        kept="masks" if content.analysis is None else kept(content.analysis),
        pairs=_closest_pairs(content.analysis),
        merged_pairs=content.pairs,
        signal_words=WORDS,
        plots={plot.name: plot for plot in plots},
        drawn=drawn,
        recipe=_as_json(content.version["recipe"], indent=2),
    )
    return Report(html, {f"{name}.svg": to_file(inline) for name, inline in drawn.items()})


def _plots(content: ReportInput) -> list[Plot]:
    version, versions, analysis = content.version, content.versions, content.analysis
    makers: list[tuple[str, Callable[[], Plot | None]]] = [
        ("results", lambda: results_plot(version["results"])),
        ("retention", lambda: retention_plot(version, versions)),
        ("tradeoff", lambda: tradeoff_plot(version, versions)),
    ]
    if content.pairs is not None:
        pairs = content.pairs
        makers.append(("pairs", lambda: pairs_plot(pairs)))
    if analysis is not None:
        makers.append(("cosine", lambda: cosine_plot(analysis)))
    if analysis is not None and not _all_is_kept(analysis):
        makers += [
            ("jaccard", lambda: jaccard_plot(analysis)),
            ("overlap", lambda: overlap_plot(analysis)),
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
    """The compared tasks with their indices in the list, by verdict."""
    grouped: dict[str, list[tuple[int, str]]] = {}
    for index, row in enumerate([] if changes is None else changes["results"]):
        grouped.setdefault(row["verdict"], []).append((index, row["task"]))
    return grouped


def _all_is_kept(analysis: Mapping[str, Any] | None) -> bool:
    """True if the members are whole task vectors, so that there are no masks to compare."""
    if analysis is None or SUBSPACES in analysis:
        return False
    sizes, counts = analysis["coordinates"], analysis["kept"].values()
    return bool(counts) and all(one == sizes for one in counts)


def _keeps_subspaces(members: Mapping[str, Any]) -> bool:
    """True if the members' deltas are subspaces."""
    return any(keeps_subspace(member["facts"].get("localizer")) for member in members.values())


def _closest_pairs(analysis: Mapping[str, Any] | None) -> list[tuple[int, int]]:
    """The pairs of members whose masks overlap most, by their indices."""
    pairs = [] if analysis is None else pairs_of(similarity(analysis))
    return [(i, j) for i, j, _ in pairs[:MOST_PAIRS]]


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
        "outcome_of": lambda gate: GateOutcome.model_validate(gate).verdict,
        "lower_is_better": lambda metric: METRICS[metric].lower_is_better,
        "against_base": lambda gain: Gain.model_validate(gain).against_base,
        "shortfall_of": lambda facts: shortfall(facts.get("recovery")),
        "named": lambda names: [(name, "number") for name in names],
    }
    return environment.get_template("page.html.j2")
