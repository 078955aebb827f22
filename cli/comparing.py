"""The commands of a researcher."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cli.app import Json, Line, app, show_result
from cli.formats import number, size, table_of, with_interval


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
    """Merge the line's members by several methods and measure each; the line stays as it is."""
    from flows.compare import compare as run

    names = [name.strip() for name in (methods or "").split(",") if name.strip()]
    show_result(run(line, names, tune, None if out is None else str(out)), as_json, compared)


def compared(found: dict[str, Any], out: Console) -> None:
    """All methods, the best first, then each task with its interval."""
    members = ", ".join(f"{task} {version}" for task, version in found["members"].items())
    out.print(f"{found['line']}: {len(found['methods'])} methods on {members}", markup=False)
    rows = found["methods"]
    table = table_of(
        "method", "mean", "normalized", "retention", "seconds", "stored", "needs", "settings"
    )
    for row in rows:
        kept = row["retention"] or {}
        table.add_row(
            row["method"],
            number(row["mean_accuracy"]),
            number(row["mean_normalized"]),
            with_interval(kept.get("ratio"), kept.get("ratio_interval")),
            "-" if row["seconds"] is None else f"{row['seconds']:.1f}",
            size(row["stored_bytes"]),
            row["needs"],
            _settings(row),
        )
    out.print(table)
    tasks = list(found["members"])
    table = table_of("method", *tasks)
    for name in ("base", "finetuned"):
        first = rows[0]["results"]
        table.add_row(name, *(number(first[task].get(name)) for task in tasks))
    for row in rows:
        results = [row["results"][task] for task in tasks]
        shown = [with_interval(one.get("merged"), one.get("interval")) for one in results]
        table.add_row(row["method"], *shown)
    out.print(table)


def _settings(row: dict[str, Any]) -> str:
    tuned = row["tuned"]["setting"] if row["tuned"] else None
    told = (f"{key} {value}" for key, value in row["settings"].items() if key != tuned)
    return ", ".join([*([f"{tuned} {row['settings'][tuned]} (tuned)"] if tuned else []), *told])
