"""The command, the arguments that several commands share, and the printing of a result."""

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any

import typer
from rich.console import Console

from restitch.cli.render.formats import console
from restitch.merging.errors import RestitchError

app = typer.Typer(name="restitch", pretty_exceptions_enable=False)


def _line_names() -> list[str]:
    """Names for shell completion; only a store on this machine answers fast enough."""
    from restitch.registry.ledger.ledger import lines
    from restitch.tasks.runtime.workspace import workspace

    with suppress(RestitchError, OSError):
        space = workspace(to_write=False)
        if space.home.store_is_local:
            return list(lines(space.objects))
    return []


def _existing(context: typer.Context, line: str | None) -> str | None:
    """Refuse an unknown line before a command imports what it needs."""
    if line is not None and not context.resilient_parsing:
        from restitch.tasks.runtime.workspace import workspace

        workspace(to_write=False).ledger(line)
    return line


def _line(help_text: str) -> Any:
    return typer.Argument(help=help_text, callback=_existing, autocompletion=_line_names)


Line = Annotated[str, _line("Name of the line.")]
AnyLine = Annotated[str | None, _line("Name of the line; all lines by default.")]
Version = Annotated[
    str,
    typer.Argument(
        help="A number, `champion` or `candidate`.",
        autocompletion=lambda: ["champion", "candidate"],
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def show_result(result: Any, as_json: bool, render: Callable[[Any, Console], None]) -> None:
    """Print a result, plain values or an outcome, as JSON or for people."""
    values = result if isinstance(result, dict) else result.as_dict()
    if as_json:
        typer.echo(json.dumps(values, indent=2, ensure_ascii=False))
    else:
        render(values, console())
