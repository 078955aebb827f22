"""The command that keeps one specialist per task, and how specialists look in a terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from restitch.cli.app import Json, Line, Version, app, show_result
from restitch.cli.render.formats import number, percent, size, table_of


@app.command()
def experts(
    line: Line,
    version: Version = "champion",
    method: Annotated[
        str, typer.Option(help="A method with one model per task, as tall or tall-ties.")
    ] = "tall",
    tune: Annotated[
        bool, typer.Option("--tune", help="Choose each task's threshold on its validation rows.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Keep these instead of others that it has.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="A folder for the table as JSON and CSV, and the plot.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Keep a specialist for each member of a version: a multi-task vector and a mask per task.

    `restitch export LINE VERSION OUT --task T` writes one of them.
    """
    from restitch.flows.research.experts import experts as run

    made = run(line, version, method, tune, replace, None if out is None else str(out))
    show_result(made.as_dict(), as_json, _kept)


def _kept(found: dict[str, Any], out: Console) -> None:
    members = ", ".join(f"{task} {version}" for task, version in found["members"].items())
    out.print(
        f"{found['line']} {found['version']}: specialists of {members} by {found['method']}"
        f" ({settings_of(found) or 'nothing to set'})",
        markup=False,
        soft_wrap=True,
    )
    by_task([found], found["members"], "expert", out, measured="grafted")
    room = found["bytes"]
    table = table_of("what", "bytes")
    table.add_row("shared by all", size(room["shared"]))
    for task, part in room["tasks"].items():
        table.add_row(task, size(part))
    table.add_row("together", size(room["all"]))
    table.add_row("with the base", size(room["all"] + room["base"]))
    table.add_row("all finetuned models", size(room["models"]))
    out.print(table)


def experts_compared(rows: Sequence[Mapping[str, Any]], out: Console) -> None:
    """Methods with one model per task: what all of the specialists take, against the models."""
    table = table_of("experts", "mean", "normalized", "bytes", "of models", "seconds", "memory")
    for row in rows:
        room = row["bytes"]
        table.add_row(
            row["method"],
            number(row["mean_accuracy"]),
            number(row["mean_normalized"]),
            size(room["all"]),
            percent(room["all"] / room["models"] if room["models"] else None),
            seconds(row),
            size(row["memory"]),
        )
    out.print(table)


def by_task(
    rows: Sequence[Mapping[str, Any]],
    members: Mapping[str, Any],
    name: str,
    out: Console,
    *,
    measured: str = "base",
) -> None:
    """Each task with its interval.

    Args:
        rows: of a comparison.
        members: their tasks.
        name: what was measured: `merged` or `expert`.
        out: where it is printed.
        measured: what stands beside the finetuned model.
    """
    table = table_of("method", "task", name, "95 %", "normalized", measured, "finetuned")
    for row in rows:
        for task in members:
            one = row["results"][task]
            span = one.get("interval")
            table.add_row(
                row["method"],
                task,
                number(one.get(name)),
                "-" if span is None else f"{number(span['low'])}-{number(span['high'])}",
                *(number(one.get(other)) for other in ("normalized", measured, "finetuned")),
            )
    out.print(table)


def seconds(row: Mapping[str, Any]) -> str:
    """How long making it took, where it was made now."""
    return "-" if row["seconds"] is None else f"{row['seconds']:.1f}"


def settings_of(row: Mapping[str, Any]) -> str:
    """The settings of a method, the tuned one first."""
    tuned = row["tuned"]["setting"] if row["tuned"] else None
    told = (f"{key} {_value(value)}" for key, value in row["settings"].items() if key != tuned)
    chosen = [f"{tuned} {_value(row['settings'][tuned])} (tuned)"] if tuned else []
    return ", ".join([*chosen, *told])


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{task}={each}" for task, each in value.items())
    return str(value)
