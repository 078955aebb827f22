"""The command, the arguments that several commands share, and the printing of a result."""

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from restitch.cli.render.formats import console
from restitch.merging.errors import RestitchError, UsageError

app = typer.Typer(name="restitch", pretty_exceptions_enable=False)


def _line_names() -> list[str]:
    """Names for shell completion; only a store on this machine answers fast enough."""
    from restitch.registry.ledger.ledger import lines_in_use
    from restitch.tasks.runtime.workspace import workspace

    with suppress(RestitchError, OSError):
        space = workspace(to_write=False)
        if space.home.store_is_local:
            return [each.line for each in lines_in_use(space.objects)]
    return []


# These refuse a mistyped name before the command imports what it needs.
def _known_line(context: typer.Context, line: str | None) -> str | None:
    if line is not None and not context.resilient_parsing:
        from restitch.tasks.runtime.workspace import workspace

        context.obj = workspace(to_write=False).ledger(line, dropped=True).state()
    return line


def _known_version(context: typer.Context, version: str) -> str:
    if not context.resilient_parsing:
        from restitch.registry.ledger.versions import find_version

        find_version(context.obj, version)
    return version


def _recorded_version(context: typer.Context, version: str) -> str:
    if not context.resilient_parsing:
        from restitch.registry.ledger.versions import find_version

        find_version(context.obj, version, purged=True)
    return version


def _known_models(context: typer.Context, model: str) -> str:
    if not context.resilient_parsing:
        from restitch.flows.promotion.versions import named_models

        named_models(context.obj, model)
    return model


def _known_task(context: typer.Context, task: str) -> str:
    if not context.resilient_parsing:
        from restitch.flows.promotion.versions import check_task

        check_task(context.obj, task)
    return task


def _line(help_text: str, callback: Callable[..., str | None] | None = _known_line) -> Any:
    return typer.Argument(help=help_text, callback=callback, autocompletion=_line_names)


Line = Annotated[str, _line("Name of the line.")]
AnyLine = Annotated[str | None, _line("Name of the line; all lines by default.")]
# Not checked: `verify` also takes a line whose state is missing or damaged.
UncheckedLine = Annotated[str | None, _line("Name of the line; all lines by default.", None)]

# Not checked: `follow` also answers when the store cannot be reached.
FollowedLine = Annotated[str, _line("Name of the line.", None)]


def _version(callback: Callable[[typer.Context, str], str]) -> Any:
    return typer.Argument(
        help="A number, `champion` or `candidate`.",
        callback=callback,
        autocompletion=lambda: ["champion", "candidate"],
    )


Version = Annotated[str, _version(_known_version)]
# Also one whose weights were purged.
RecordedVersion = Annotated[str, _version(_recorded_version)]
Models = Annotated[
    str,
    typer.Argument(metavar="TASK[/VERSION]", help="A task, or one model.", callback=_known_models),
]
Task = Annotated[str, typer.Argument(help="Name of the task.", callback=_known_task)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def show_result(
    result: Any, as_json: bool, render: Callable[[Any, Console], None], code: int = 0
) -> NoReturn:
    """Print a result, plain values or an outcome, and exit with its code if it has one.

    Plain values have no code; for them it is given.
    """
    values = result if isinstance(result, dict) else result.as_dict()
    if as_json:
        typer.echo(json.dumps(values, indent=2, ensure_ascii=False))
    else:
        render(values, console())
    raise typer.Exit(getattr(result, "exit_code", code))


def confirm_plan(
    plan: Any, yes: bool, render: Callable[[Any, Console], None], question: str, unasked: str
) -> None:
    """Show what a command is about to do, and ask unless the answer was given.

    Args:
        plan: what is shown.
        yes: the answer is given.
        render: prints the plan.
        question: what is asked at a terminal.
        unasked: what did not happen and why, where there is no terminal.

    Raises:
        UsageError: there is no terminal to ask at.
    """
    render(plan.as_dict(), Console(stderr=True, highlight=False))
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError(
            f"{unasked}, and there is no terminal to ask at",
            hint="look at the plan above, then run the same command with --yes",
        )
    typer.confirm(question, abort=True, err=True)
