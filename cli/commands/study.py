"""The command that makes the studies of the papers."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from restitch.cli.app import Json, Line, app, show_result
from restitch.cli.render.formats import table_of, text
from restitch.flows.research.study import STUDIES

# A wider table has the values by task in its CSV and JSON alone: a terminal has 80 columns.
MOST_COLUMNS = 8

_LISTED = "\n\n".join(f"{name}: {about}" for name, about in STUDIES.items())


@app.command(
    help="Make a study of the papers for the members of a line: a table, plots, and a run in "
    f"MLflow; the line stays as it is.\n\n{_LISTED}"
)
def study(
    name: Annotated[str, typer.Argument(help="Which; they are listed above.")],
    line: Line,
    out: Annotated[
        Path | None, typer.Option(help="A folder for the table as CSV and JSON, and the plots.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a study."""
    from restitch.flows.research.study.flow import study as run

    outcome = run(name, line, None if out is None else str(out))
    show_result(outcome.as_dict(), as_json, studied)


def studied(found: dict[str, Any], out: Console) -> None:
    """The table of a study, and what must be known of it."""
    members = ", ".join(f"{task} {version}" for task, version in found["members"].items())
    out.print(f"{found['line']} {found['version']}, {found['about']}: {members}", markup=False)
    columns = [name for name in found["columns"] if name not in found["details"]]
    if len(columns) > MOST_COLUMNS:
        columns = [name for name in columns if name not in found["members"]]
    table = table_of(*columns)
    for row in found["rows"]:
        table.add_row(*(_value(row[column]) for column in columns))
    out.print(table)
    for note in found["notes"]:
        out.print(f"  {note}", markup=False)


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else text(value)
