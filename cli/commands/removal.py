"""Commands that undo mistakes: forget a model, drop a line, and purge their weights."""

from typing import Annotated, Any

import typer

from restitch.cli.app import Json, Line, Models, confirm_plan, show_result
from restitch.cli.commands.audit import Reason, Remerge
from restitch.cli.render import removal as render
from restitch.cli.render.audit import decided

Purge = Annotated[
    bool, typer.Option("--purge", help="Delete the weights, and all that was made from them.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Purge without a question.")]


def forget(
    line: Line,
    model: Models,
    reason: Reason,
    purge: Purge = False,
    yes: Yes = False,
    remerge: Remerge = True,
    as_json: Json = False,
) -> None:
    """Undo a registration: leave a task, or one model, out of everything from now on.

    The trail and the records stay. With --purge the weights go as well, and so do the versions
    that hold them: these can then not be exported or rebuilt.
    """
    if not purge:
        from restitch.flows.decisions import forget as run

        show_result(run(line, model, reason, merge=remerge), as_json, decided)
    from restitch.flows.storage.purge import forget_and_purge, plan_purge

    _confirm(plan_purge(line, model), yes)
    show_result(forget_and_purge(line, model, reason, merge=remerge), as_json, render.purged)


def drop(
    line: Line,
    reason: Reason,
    purge: Purge = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Remove a line from use: no status, no schedule, no merges.

    Its trail and its records stay, for `history`, `show` and `verify`. `init` with the same name
    and base starts it again.
    """
    from restitch.deployments.server.deploy import keep_schedules

    if not purge:
        from restitch.flows.decisions import drop as run

        decision = run(line, reason)
        keep_schedules(line)
        show_result(decision, as_json, decided)
    from restitch.flows.storage.purge import drop_and_purge, plan_purge

    _confirm(plan_purge(line, None), yes)
    outcome = drop_and_purge(line, reason)
    keep_schedules(line)
    show_result(outcome, as_json, render.purged)


def _confirm(plan: Any, yes: bool) -> None:
    unasked = "nothing was purged: a purge cannot be undone"
    confirm_plan(plan, yes, render.plan, "purge this?", unasked)
