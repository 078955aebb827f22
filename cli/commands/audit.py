"""The commands of an auditor, and the decisions that people make about a line."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from restitch.cli.app import Json, Line, Version, app, show_result
from restitch.cli.render import audit as render
from restitch.merging.errors import UsageError

if TYPE_CHECKING:
    from restitch.flows.decisions import Decision

Task = Annotated[str, typer.Argument(help="Name of the task.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; it stands in the audit trail.")]
SomeReason = Annotated[str, typer.Option("--reason", help="Why, if there is more to say.")]
Remerge = Annotated[bool, typer.Option(help="Merge without waiting for the schedule.")]


@app.command()
def history(
    line: Line,
    as_of: Annotated[
        str | None,
        typer.Option("--as-of", metavar="TIME", help="What was in use then; a date is its end."),
    ] = None,
    task: Annotated[str | None, typer.Option(help="Acts about models of this task.")] = None,
    event: Annotated[str | None, typer.Option(help="Acts of this kind, as `promoted`.")] = None,
    since: Annotated[str | None, typer.Option(metavar="TIME", help="Acts from then on.")] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Acts until then.")] = None,
    versions: Annotated[
        bool, typer.Option("--versions", help="List the merged versions with their metrics.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show the audit trail, what was in use at a time, or all merged versions.

    Times are UTC unless they say otherwise.
    """
    from restitch.cli.timestamps import moment, start_of
    from restitch.flows.audit import queries

    narrowed = [name for name in (task, event, since, until) if name is not None]
    if (as_of is not None) + versions + bool(narrowed) > 1:
        raise typer.BadParameter("--as-of, --versions and filters of acts exclude each other")
    if as_of is not None:
        show_result(queries.as_of(line, moment(as_of)), as_json, render.as_of)
    elif versions:
        show_result(queries.versions(line), as_json, render.versions)
    else:
        first = None if since is None else start_of(since)
        last = None if until is None else moment(until)
        wanted = queries.Wanted(task, event, first, last)
        show_result(queries.history(line, wanted), as_json, render.history)


@app.command()
def show(line: Line, version: Version = "champion", as_json: Json = False) -> None:
    """Show one merged version: recipe, members, results, retention, gates, cost, links."""
    from restitch.flows.audit.queries import show as view

    show_result(view(line, version), as_json, render.show)


@app.command()
def report(
    line: Line,
    version: Version,
    out: Annotated[Path, typer.Argument(help="A folder, or a file that ends with .html.")],
    as_json: Json = False,
) -> None:
    """Write the report of a merged version: one page that needs no network, and its plots."""
    from restitch.flows.audit.report import write_report

    show_result(write_report(line, version, out).as_dict(), as_json, render.reported)


@app.command()
def diff(line: Line, a: Version, b: Version = "champion", as_json: Json = False) -> None:
    """Show what version B has otherwise than version A, and what each difference is worth."""
    from restitch.flows.audit.diff import diff as run

    show_result(run(line, a, b), as_json, render.diff)


@app.command()
def why(line: Line, task: Task, as_json: Json = False) -> None:
    """Show how a task came to its accuracy over the versions, and which merge changed it."""
    from restitch.flows.audit.queries import why as view

    show_result(view(line, task), as_json, render.why)


@app.command()
def verify(
    line: Annotated[str | None, typer.Argument(help="Name of the line; all without.")] = None,
    version: Annotated[str | None, typer.Option(help="This one alone; all by default.")] = None,
    without: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT", help="A digest, task or task/version to prove absent from versions."
        ),
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Every object of the store, of whatever line.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="With --deep, and make again what can be.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare a line with its record: trail, objects, and every version rebuilt.

    Exit code 7 where something is damaged and not mended, 5 where --without names what is there.
    """
    if line is not None and not (deep or repair):
        from restitch.flows.storage.verify import verify as run

        found = run(line, version, without)
        show_result(found.as_dict(), as_json, render.verified)
        raise typer.Exit(found.exit_code)
    if version is not None or without is not None:
        raise UsageError(
            "--version and --without are about one line, and not about the store",
            hint="restitch verify LINE --version N --without WHAT",
        )
    from restitch.flows.storage.verify_all import verify_all

    whole = verify_all(line, deep=deep, repair=repair)
    show_result(whole.as_dict(), as_json, render.all_verified)
    raise typer.Exit(whole.exit_code)


@app.command()
def rollback(line: Line, version: Version, reason: Reason, as_json: Json = False) -> None:
    """Put a former champion back in use, and pin the line to it."""
    from restitch.flows.decisions import rollback as run

    _decide(lambda: run(line, version, reason), as_json)


@app.command()
def promote(line: Line, version: Version, reason: Reason, as_json: Json = False) -> None:
    """Put a version in use by hand, also past a gate that it failed."""
    from restitch.flows.decisions import promote as run

    _decide(lambda: run(line, version, reason), as_json)


@app.command()
def retire(
    line: Line, task: Task, reason: Reason, remerge: Remerge = True, as_json: Json = False
) -> None:
    """Take a task out of all merges to come, and merge without it."""
    from restitch.flows.decisions import retire as run

    _decide(lambda: run(line, task, reason, merge=remerge), as_json)


@app.command()
def restore(
    line: Line,
    task: Task,
    reason: SomeReason = "",
    remerge: Remerge = True,
    as_json: Json = False,
) -> None:
    """Take a retired task back in, and merge with it."""
    from restitch.flows.decisions import restore as run

    _decide(lambda: run(line, task, reason, merge=remerge), as_json)


@app.command()
def pin(line: Line, reason: SomeReason = "", as_json: Json = False) -> None:
    """Promote nothing automatically any more; versions are still made as candidates."""
    from restitch.flows.decisions import pin as run

    _decide(lambda: run(line, reason), as_json)


@app.command()
def unpin(
    line: Line, reason: SomeReason = "", remerge: Remerge = True, as_json: Json = False
) -> None:
    """Promote automatically again, and bring the merged model up to date."""
    from restitch.flows.decisions import unpin as run

    _decide(lambda: run(line, reason, merge=remerge), as_json)


def _decide(run: "Callable[[], Decision]", as_json: bool) -> None:
    found: Any = run()
    show_result(found.as_dict(), as_json, render.decided)
    raise typer.Exit(found.exit_code)
