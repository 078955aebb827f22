"""Commands of a researcher; all but `experts` leave the line as it is."""

from pathlib import Path
from typing import Annotated

import typer

from restitch.cli.app import Json, Line, Version, show_result
from restitch.cli.render import research as render
from restitch.flows.research.study import STUDIES
from restitch.merging.errors import BadInput

Tune = Annotated[
    bool, typer.Option("--tune", help="Choose each method's setting on validation rows.")
]


def compare(
    line: Line,
    methods: Annotated[
        str | None, typer.Option(help="Names, separated by commas; all methods by default.")
    ] = None,
    tune: Tune = False,
    out: Annotated[
        Path | None, typer.Option(help="A folder for the table as JSON and the plot.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Merge the line's members by several methods and measure each.

    One table has the methods with one model for all tasks, another those with one per task.
    """
    from restitch.flows.research.compare import compare as run

    result = run(line, _names(methods), tune, None if out is None else str(out))
    show_result(result.as_dict(), as_json, render.compared)


def experts(
    line: Line,
    version: Version = "champion",
    method: Annotated[
        str, typer.Option(help="A method with one model per task, such as tall or tall-ties.")
    ] = "tall",
    tune: Annotated[
        bool, typer.Option("--tune", help="Choose each task's threshold on its validation rows.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace other specialists of the version.")
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

    result = run(line, version, method, tune, replace, None if out is None else str(out))
    show_result(result.as_dict(), as_json, render.specialists)


def analyze(
    line: Line,
    task: Annotated[
        str | None, typer.Option(help="Names, separated by commas; all tasks by default.")
    ] = None,
    pair: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Two tasks to merge; by default those with most in common."
        ),
    ] = None,
    localizers: Annotated[
        str | None,
        typer.Option(
            help="Of dataless, fisher, distilled, trained, random; by default dataless, random "
            "and the line's own."
        ),
    ] = None,
    densities: Annotated[
        str | None, typer.Option(help="Fractions of the coordinates, such as 0.01,0.1,1.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder for the analysis as JSON and the plots.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure what the line's masks hold, share and reach as they grow."""
    fractions = [_fraction(one) for one in _names(densities)]
    from restitch.flows.research.analyze import analyze as run

    folder = None if out is None else str(out)
    result = run(line, _names(task), _names(pair), _names(localizers), fractions, folder)
    show_result(result.as_dict(), as_json, render.analyzed)


def study(
    name: Annotated[str, typer.Argument(help="One of the studies above.")],
    line: Line,
    out: Annotated[
        Path | None, typer.Option(help="A folder for the table as CSV and JSON, and the plots.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Repeat a study."""
    from restitch.flows.research.study.flow import study as run

    result = run(name, line, None if out is None else str(out))
    show_result(result.as_dict(), as_json, render.studied)


study.__doc__ = (
    "Repeat a study of the papers with the members of a line: a table, plots, a run in MLflow."
    + "".join(f"\n\n{name}: {about}" for name, about in STUDIES.items())
)


def _names(value: str | None) -> list[str]:
    return [name.strip() for name in (value or "").split(",") if name.strip()]


def _fraction(value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise BadInput(
            f"--densities: {value!r} is not a number",
            expected="fractions, separated by commas, such as 0.01,0.1,1",
        ) from error
