"""The commands of a researcher."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from restitch.cli.app import Json, Line, app, show_result
from restitch.cli.commands.experts import by_task, experts_compared, seconds, settings_of
from restitch.cli.render.formats import (
    number,
    percent,
    size,
    table_of,
    text,
    with_half,
    with_interval,
)
from restitch.merging.errors import BadInput


@app.command()
def compare(
    line: Line,
    methods: Annotated[
        str | None, typer.Option(help="Names with commas between; all methods by default.")
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Choose each method's setting on validation rows.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="A folder for the table as JSON and the plot.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Merge the line's members by several methods and measure each; the line stays as it is.

    Methods with one model for all tasks, and those with one for each, stand in two tables.
    """
    from restitch.flows.research.compare import compare as run

    outcome = run(line, _names(methods), tune, None if out is None else str(out))
    show_result(outcome.as_dict(), as_json, compared)


@app.command()
def analyze(
    line: Line,
    task: Annotated[
        str | None, typer.Option(help="Names with commas between; all tasks by default.")
    ] = None,
    pair: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Two tasks to merge; by default those that overlap most."),
    ] = None,
    localizers: Annotated[
        str | None,
        typer.Option(
            help="Of dataless, fisher, distilled, trained, random; by default dataless, random "
            "and the line's own."
        ),
    ] = None,
    densities: Annotated[
        str | None, typer.Option(help="Shares of the coordinates, such as 0.01,0.1,1.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder for the analysis as JSON and the plots.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What the masks in use hold, share and reach as they grow; the line stays as it is."""
    from restitch.flows.research.analyze import analyze as run

    outcome = run(
        line,
        _names(task),
        _names(pair),
        _names(localizers),
        [_fraction(one) for one in _names(densities)],
        None if out is None else str(out),
    )
    show_result(outcome.as_dict(), as_json, analyzed)


def _names(given: str | None) -> list[str]:
    return [name.strip() for name in (given or "").split(",") if name.strip()]


def _fraction(given: str) -> float:
    try:
        return float(given)
    except ValueError as error:
        raise BadInput(
            "a density cannot be read",
            expected="fractions with commas between, such as 0.01,0.1,1",
            found=given,
            hint="correct --densities",
        ) from error


def compared(found: dict[str, Any], out: Console) -> None:
    """The methods of either kind, the best first, then each task with its interval."""
    members = ", ".join(f"{task} {version}" for task, version in found["members"].items())
    rows, experts = found["methods"], found["experts"]
    out.print(f"{found['line']}: {len(rows) + len(experts)} methods on {members}", markup=False)
    if rows:
        table = table_of("method", "mean", "normalized", "retention", "seconds", "memory", "stored")
        for row in rows:
            kept = row["retention"] or {}
            table.add_row(
                row["method"],
                number(row["mean_accuracy"]),
                number(row["mean_normalized"]),
                with_interval(kept.get("ratio"), kept.get("ratio_interval")),
                seconds(row),
                size(row["memory"]),
                size(row["stored_bytes"]),
            )
        out.print(table)
    if experts:
        experts_compared(experts, out)
    for row in (*rows, *experts):
        settings = settings_of(row) or "nothing to set"
        out.print(f"  {row['method']} merges {row['needs']}: {settings}", markup=False)
    if rows:
        by_task(rows, found["members"], "merged", out)
    if experts:
        by_task(experts, found["members"], "expert", out)


def analyzed(found: dict[str, Any], out: Console) -> None:
    """The curves of each task, the pair, and what the masks share."""
    members = ", ".join(f"{task} {version}" for task, version in found["members"].items())
    out.print(f"{found['line']} {found['version']}: {members}", markup=False)
    for task, one in found["tasks"].items():
        _curves(task, one, out)
    if found["pair"] is not None:
        _pair(found["pair"], out)
    _masks(found["masks"], out)


def _curves(task: str, found: dict[str, Any], out: Console) -> None:
    ends = ", ".join(f"{name} {number(found[name]['value'])}" for name in ("base", "finetuned"))
    own = f"in use {number(found['own']['value'])} at {percent(found['own']['density'])}"
    out.print(f"\n{task}, grafted {found['metric']}: {ends}, {own}", markup=False)
    curves = found["curves"].values()
    if not curves:
        return
    table = table_of("kept", *found["curves"])
    for points in zip(*(curve["points"] for curve in curves), strict=True):
        shown = (with_half(point["value"], point["interval"]) for point in points)
        table.add_row(percent(points[0]["density"]), *shown)
    out.print(table)


def _pair(found: dict[str, Any], out: Console) -> None:
    tasks, method = found["tasks"], found["method"]
    told = f"{' and '.join(tasks)}, merged by {method}, masks by {found['localizers'][0]}"
    out.print(f"\n{told}", markup=False)
    table = table_of("density", "shared", "share", "mean", *tasks)
    rows = [*found["points"], {**found["averaging"], "density": None}]
    for row in rows:
        values = (row["tasks"][task] for task in tasks)
        table.add_row(
            "averaging" if row["density"] is None else percent(row["density"]),
            text(row.get("shared")),
            percent(row.get("share")),
            number(row["mean"]),
            *(with_half(value["value"], value["interval"]) for value in values),
        )
    out.print(table)


def _masks(found: dict[str, Any], out: Console) -> None:
    tasks = found["tasks"]
    for name, title in (
        ("jaccard", "Jaccard index of the masks"),
        ("cosine", "cosine of the masked task vectors"),
    ):
        out.print(f"\n{title}", markup=False)
        table = table_of("task", *tasks)
        for task, row in zip(tasks, found[name], strict=True):
            table.add_row(task, *(number(value) for value in row))
        out.print(table)
    out.print("\ncoordinates by how many members keep them", markup=False)
    table = table_of("owners", "coordinates")
    for owners, count in enumerate(found["owners"], 1):
        table.add_row(str(owners), f"{count:,}")
    out.print(table)
    places = found["places"]
    for name, group in (("component", "components"), ("layer", "layers")):
        out.print(f"\nshare of the masks by {name}", markup=False)
        table = table_of(name, *tasks, "all weights")
        shares = [places[f"by_{name}"]["tasks"][task] for task in tasks]
        for part in places[group]:
            columns = (*shares, places[f"by_{name}"]["all"])
            table.add_row(part, *(percent(share.get(part, 0.0)) for share in columns))
        out.print(table)
