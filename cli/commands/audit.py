"""Commands of an auditor, and people's decisions about the version in use."""

from datetime import time
from pathlib import Path
from typing import Annotated

import typer

from restitch.cli.app import Json, Line, RecordedVersion, Task, UncheckedLine, Version, show_result
from restitch.cli.render import audit as render
from restitch.merging.errors import BadInput, UsageError

Reason = Annotated[str, typer.Option("--reason", help="Why; the audit trail keeps it.")]
OptionalReason = Annotated[str, typer.Option("--reason", help="Why, for the audit trail.")]
Remerge = Annotated[bool, typer.Option(help="Merge now, without waiting for the schedule.")]


def history(
    line: Line,
    as_of: Annotated[
        str | None, typer.Option(metavar="TIME", help="The version in use then; a date is its end.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Only acts about models of this task.")] = None,
    event: Annotated[str | None, typer.Option(help="Only acts of this kind: `promoted`.")] = None,
    since: Annotated[str | None, typer.Option(metavar="TIME", help="Only acts since then.")] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Only acts until then.")] = None,
    versions: Annotated[
        bool, typer.Option("--versions", help="Merged versions, not acts.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show the audit trail, the version in use at a time, or all merged versions.

    A time without a zone is UTC.
    """
    from restitch.cli.timestamps import parse_time
    from restitch.flows.audit import queries

    filters = [name for name in (task, event, since, until) if name is not None]
    if (as_of is not None) + versions + bool(filters) > 1:
        raise typer.BadParameter("--as-of, --versions and filters of acts exclude each other")
    if as_of is not None:
        show_result(queries.as_of(line, parse_time(as_of)), as_json, render.as_of)
    elif versions:
        show_result(queries.versions(line), as_json, render.versions)
    else:
        first = None if since is None else parse_time(since, time.min)
        last = None if until is None else parse_time(until)
        selection = queries.HistoryFilter(task, event, first, last)
        show_result(queries.history(line, selection), as_json, render.history)


def show(line: Line, version: RecordedVersion = "champion", as_json: Json = False) -> None:
    """Show a merged version: recipe, members, results, retention, gates, cost, links.

    Exits with 3 if its weights were purged; its record is shown nevertheless.
    """
    from restitch.flows.audit.queries import show as view

    values = view(line, version)
    show_result(values, as_json, render.show, BadInput.exit_code if values["purged"] else 0)


def report(
    line: Line,
    version: Version,
    out: Annotated[Path, typer.Argument(help="A folder, or a file that ends with .html.")],
    as_json: Json = False,
) -> None:
    """Write the report of a merged version: one page that needs no network, and its plots."""
    from restitch.flows.audit.report import write_report

    show_result(write_report(line, version, out), as_json, render.reported)


def diff(line: Line, a: Version, b: Version = "champion", as_json: Json = False) -> None:
    """Compare version B with version A: members, settings, results, weights."""
    from restitch.flows.audit.diff import diff as run

    show_result(run(line, a, b), as_json, render.diff)


def why(line: Line, task: Task, as_json: Json = False) -> None:
    """Follow a task's accuracy over the versions, and show which merge changed it."""
    from restitch.flows.audit.queries import why as view

    show_result(view(line, task), as_json, render.why)


def verify(
    line: UncheckedLine = None,
    version: Annotated[str | None, typer.Option(help="Only this version.")] = None,
    without: Annotated[
        str | None,
        typer.Option(metavar="WHAT", help="Prove a digest, task or task/version absent."),
    ] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Check the whole store.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="As --deep; repair damage.")] = False,
    as_json: Json = False,
) -> None:
    """Compare a line with its record: the trail, all objects, and every version rebuilt.

    Exits with 7 if damage remains, and with 5 if --without names something that is present.
    """
    if line is not None and not (deep or repair):
        from restitch.flows.storage.verify import verify as run

        show_result(run(line, version, without), as_json, render.verified)
    if version is not None or without is not None:
        raise UsageError(
            "--version and --without need one line, and exclude --deep and --repair",
            hint="restitch verify LINE --version N --without WHAT",
        )
    from restitch.flows.storage.verify_all import verify_all

    show_result(verify_all(line, deep=deep, repair=repair), as_json, render.all_verified)


def rollback(line: Line, version: Version, reason: Reason, as_json: Json = False) -> None:
    """Use a former champion again, and pin the line to it."""
    from restitch.flows.decisions import rollback as run

    show_result(run(line, version, reason), as_json, render.decided)


def promote(line: Line, version: Version, reason: Reason, as_json: Json = False) -> None:
    """Make a version the champion by hand, even if it failed a gate."""
    from restitch.flows.decisions import promote as run

    show_result(run(line, version, reason), as_json, render.decided)


def pin(line: Line, reason: OptionalReason = "", as_json: Json = False) -> None:
    """Stop automatic promotion; new versions become candidates."""
    from restitch.flows.decisions import pin as run

    show_result(run(line, reason), as_json, render.decided)


def unpin(
    line: Line, reason: OptionalReason = "", remerge: Remerge = True, as_json: Json = False
) -> None:
    """Promote automatically again, and bring the merged model up to date."""
    from restitch.flows.decisions import unpin as run

    show_result(run(line, reason, merge=remerge), as_json, render.decided)


def pause(
    line: Line,
    reason: Reason,
    schedule_only: Annotated[
        bool, typer.Option("--schedule-only", help="Only the schedule; events still start work.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Stop all automatic work on a line, or its schedule, until `resume`."""
    from restitch.deployments.server.deploy import keep_schedules
    from restitch.flows.decisions import pause as run

    decision = run(line, reason, schedule_only=schedule_only)
    keep_schedules(line)
    show_result(decision, as_json, render.decided)


def resume(
    line: Line, reason: OptionalReason = "", remerge: Remerge = True, as_json: Json = False
) -> None:
    """Let a paused line go on, and bring its merged model up to date."""
    from restitch.deployments.server.deploy import keep_schedules
    from restitch.flows.decisions import resume as run

    decision = run(line, reason, merge=remerge)
    keep_schedules(line)
    show_result(decision, as_json, render.decided)
