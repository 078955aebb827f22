"""Commands of a researcher; all but `experts` leave the line as it is."""

from collections.abc import Mapping
from typing import Annotated

import typer

from restitch.cli.app import Json, Line, Version, show_result
from restitch.cli.render import research as render
from restitch.flows.research.study import STUDIES
from restitch.merging.errors import BadInput

Tune = Annotated[bool, typer.Option("--tune", help="Choose settings on validation rows.")]
Names = Annotated[str | None, typer.Option(help="Names with commas between; all by default.")]
Out = Annotated[str | None, typer.Option(metavar="FOLDER", help="For the tables and plots.")]


def compare(
    line: Line,
    methods: Names = None,
    tune: Tune = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Merge the line's members by several methods and measure each.

    One table has the methods with one model for all tasks, another those with one per task.
    """
    from restitch.flows.research.compare import compare as run

    show_result(run(line, _names(methods), tune, out), as_json, render.compared)


def experts(
    line: Line,
    version: Version = "champion",
    method: Annotated[str, typer.Option(help="A method with one model per task.")] = "tall",
    tune: Tune = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace other specialists of the version.")
    ] = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Keep a specialist for each member of a version: a multi-task vector and a mask per task.

    `restitch export LINE VERSION OUT --task T --specialist` writes one of them.
    """
    from restitch.flows.research.experts import experts as run

    outcome = run(line, version, method, tune, replace, out)
    show_result(outcome, as_json, render.specialists)


def analyze(
    line: Line,
    task: Names = None,
    pair: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Two tasks; by default those that overlap most."),
    ] = None,
    localizers: Annotated[
        str | None,
        typer.Option(
            help="Of dataless, fisher, distilled, trained, random; by default dataless, random "
            "and the line's own."
        ),
    ] = None,
    densities: Annotated[str | None, typer.Option(help="Fractions such as 0.01,0.1,1.")] = None,
    pairs: Annotated[
        bool,
        typer.Option("--pairs", help="Which members fit together: signals, and what pairs lose."),
    ] = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure what the line's masks hold, share and reach as they grow.

    With `--pairs`, measure every two members instead: signals of conflict, what merging the two
    loses, and how well each signal predicts that.
    """
    if pairs:
        _refuse_with_pairs({"--pair": pair, "--localizers": localizers, "--densities": densities})
        from restitch.flows.research.pairs import analyze_pairs

        show_result(analyze_pairs(line, _names(task), out), as_json, render.paired)
    fractions = [_fraction(one) for one in _names(densities)]
    from restitch.flows.research.analyze import analyze as run

    outcome = run(line, _names(task), _names(pair), _names(localizers), fractions, out)
    show_result(outcome, as_json, render.analyzed)


def study(
    name: Annotated[str, typer.Argument(help="One of the studies above.")],
    line: Line,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Repeat a study."""
    from restitch.flows.research.study.flow import study as run

    show_result(run(name, line, out), as_json, render.studied)


study.__doc__ = (
    "Repeat a study of the papers with the members of a line: a table, plots, a run in MLflow."
    + "".join(f"\n\n{name}: {about}" for name, about in STUDIES.items())
)


def _refuse_with_pairs(options: Mapping[str, str | None]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise BadInput(
            f"--pairs cannot be used with {', '.join(given)}",
            expected="--pairs with --task, --out or --json",
            hint="run the command twice to measure both",
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
