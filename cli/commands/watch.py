"""`restitch status --watch`: the status again and again, until Ctrl-C.

On a terminal the picture stays in place and is drawn anew when something changed. Elsewhere,
and with `--json`, each new picture is printed once: one JSON document per line.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console

from restitch.cli.render import lines as render

EVERY_SECONDS = 1.0


def follow(look: Callable[[], dict[str, Any]], as_json: bool) -> None:
    """Show what `look` finds whenever it has changed; returns on Ctrl-C."""
    out = Console(highlight=False)
    last: dict[str, Any] | None = None
    try:
        while True:
            found = look()
            if found != last:
                last = found
                _show(found, as_json, out)
            time.sleep(EVERY_SECONDS)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def _show(found: dict[str, Any], as_json: bool, out: Console) -> None:
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
        return
    if out.is_terminal:
        out.clear()
    out.print(time.strftime("%H:%M:%S"), style="dim")
    render.status(found, out)
