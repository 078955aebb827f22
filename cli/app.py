"""The command itself, and what all of its commands share: arguments, and printing a result."""

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    name="restitch",
    help="One merged model, kept current.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Line = Annotated[str, typer.Argument(help="Name of the line.")]
Version = Annotated[str, typer.Argument(help="A number, `champion` or `candidate`.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def show_result(outcome: Any, as_json: bool, table: Callable[[Any, Console], None]) -> None:
    """Print a result: as JSON, or as its table."""
    if as_json:
        typer.echo(json.dumps(outcome, indent=2, ensure_ascii=False))
    else:
        table(outcome, Console(highlight=False))
