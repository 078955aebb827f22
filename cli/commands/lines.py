"""Commands about a line: make it, declare a task, look at it, bring its merged model up to date."""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from restitch.cli.app import AnyLine, Json, Line, show_result
from restitch.cli.render import lines as render
from restitch.cli.render.formats import console

WATCH_EVERY_SECONDS = 1.0


def _readable(context: typer.Context, file: Path) -> Path:
    """Refuse a task file that cannot be used before a command imports what it needs."""
    if not context.resilient_parsing:
        from restitch.registry.specs.files import load_task

        load_task(file)
    return file


TaskFile = Annotated[
    Path, typer.Option("--task", help="YAML file of the task.", callback=_readable)
]
ReplaceTask = Annotated[
    bool,
    typer.Option("--replace-task", help="Accept a task file that differs from the known one."),
]


def init(
    file: Annotated[Path, typer.Argument(help="YAML file of the line.")], as_json: Json = False
) -> None:
    """Make a line, or update it, from a YAML file."""
    from restitch.registry.specs.files import NoFamily, NoMethod, load_line

    with suppress(NoFamily, NoMethod):  # for which `init_line` looks at the base
        load_line(file)  # before anything heavy is imported
    from restitch.deployments.server.deploy import keep_schedules
    from restitch.flows.lines.init_line import init_line

    outcome = init_line(file)
    keep_schedules(outcome.line)
    show_result(outcome, as_json, render.init)


def task(
    line: Line, file: TaskFile, replace_task: ReplaceTask = False, as_json: Json = False
) -> None:
    """Declare a task without a model, for models that are registered in MLflow."""
    from restitch.flows.lines.declare_task import declare_task

    outcome = declare_task(line, file, replace_task=replace_task)
    show_result(outcome, as_json, render.declared)


def remerge(
    line: Line,
    force: Annotated[
        bool, typer.Option("--force", help="Stitch and evaluate again although nothing changed.")
    ] = False,
    republish: Annotated[
        bool,
        typer.Option(
            "--republish",
            help="Write all that MLflow shows of the line again: after an upgrade, or when the "
            "store has moved.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Bring the merged model up to date; does nothing when nothing changed."""
    from restitch.flows.remerge import remerge as run

    show_result(run(line, force, republish), as_json, render.remerged)


def status(
    line: AnyLine = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow changes until Ctrl-C.")] = False,
    as_json: Json = False,
) -> None:
    """Show members, their states, champion and candidate."""
    from restitch.cli.views import status as view

    if watch:
        _follow(lambda: view(line), as_json)
    else:
        show_result(view(line), as_json, render.status)


def schema(kind: Annotated[Literal["line", "task"], typer.Argument(help="The file.")]) -> None:
    """Print the JSON schema of line or task files, with which editors complete their keys."""
    from restitch.registry.specs.schema import schema_of

    typer.echo(json.dumps(schema_of(kind), indent=2, ensure_ascii=False))


def _follow(view: Callable[[], dict[str, Any]], as_json: bool) -> None:
    """Show the status after every change, until Ctrl-C.

    A terminal is cleared and drawn again. Elsewhere each status is printed once, with `--json`
    as one document per line.
    """
    out = console()
    last: dict[str, Any] | None = None
    try:
        while True:
            current = view()
            if current != last and as_json:
                typer.echo(json.dumps(current, ensure_ascii=False))
            elif current != last:
                if out.is_terminal:
                    out.clear()
                out.print(time.strftime("%H:%M:%S"), style="dim")
                render.status(current, out)
            last = current
            time.sleep(WATCH_EVERY_SECONDS)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None
