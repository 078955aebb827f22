"""Commands of a researcher; all but `experts` leave the line as it is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from restitch.cli.app import Json, Line, Version, confirm_plan, show_result
from restitch.cli.render import research as render
from restitch.flows.research.study import STUDIES
from restitch.merging.errors import BadInput
from restitch.registry.specs.paper import load_paper, paper_names

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


study = typer.Typer(
    name="study",
    help="Repeat a study of the papers: a table, plots, a run in MLflow.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _add_study(name: str, about: str) -> None:
    """Add the command of a study that measures the members of a line."""

    def run(line: Line, out: Out = None, as_json: Json = False) -> None:
        from restitch.flows.research.study.flow import study as run_study

        show_result(run_study(name, line, out), as_json, render.studied)

    help_text = f"{about[0].upper()}{about[1:]}.\n\nThe members are those of the version in use."
    study.command(name, help=help_text)(run)


for _name, _about in STUDIES.items():
    _add_study(_name, _about)


@study.command(
    help="Repeat a published table, with the published numbers next to those measured here.\n\n"
    "It prints the disk space, memory and hours that it needs, and asks. It then registers the "
    "models of the paper in a line of its name, and compares all methods. An interrupted study "
    f"goes on where it was.\n\nPapers: {', '.join(paper_names())}."
)
def paper(
    name: Annotated[
        str,
        typer.Argument(help="A paper, or the path of a paper file.", autocompletion=paper_names),
    ],
    models: Annotated[
        str | None,
        typer.Option(help="Other models: a folder with one per task, or an id with {task}."),
    ] = None,
    benchmark: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Images of the general benchmark, in class folders."),
    ] = None,
    retention: Annotated[bool, typer.Option(help="Measure the general benchmark.")] = True,
    methods: Names = None,
    tune: Tune = False,
    plan: Annotated[bool, typer.Option("--plan", help="Only print what it needs.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Start without a question.")] = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Repeat a published table."""
    read = load_paper(name, models=models, benchmark=benchmark, retention=retention)
    from restitch.flows.research.paper_plan import plan_paper

    planned = plan_paper(read, _names(methods), tune)
    if plan:
        show_result(planned, as_json, render.paper_plan)
    unasked = "nothing was started: the study needs the above"
    confirm_plan(planned, yes, render.paper_plan, "start it?", unasked)
    from restitch.flows.research.paper import study_paper

    place = None if benchmark is None else str(benchmark)
    outcome = study_paper(name, models, place, retention, _names(methods), tune, out)
    show_result(outcome, as_json, render.paper_table)


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
