"""The command that makes room in a store."""

from typing import Annotated, Any

import typer
from rich.console import Console

from restitch.cli.app import Json, app, show_result
from restitch.cli.render.formats import size, table_of


@app.command()
def gc(
    older_than: Annotated[
        str, typer.Option(metavar="AGE", help="Keep what is younger, as 24h, 90m or 7d.")
    ] = "24h",
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove it; without, it is only shown.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what nothing in the store refers to, and with --yes remove it.

    Whatever a line, one of its versions or any audit entry names stays.
    """
    from restitch.flows.storage.gc import collect
    from restitch.registry.sizes import parse_age

    outcome = collect(parse_age(older_than), remove=yes)
    show_result(outcome.as_dict(), as_json, _collected)


def _collected(found: dict[str, Any], out: Console) -> None:
    done = "removed" if found["removed"] else "would be removed"
    out.print(f"{found['objects']} objects {done} ({size(found['bytes'])})", soft_wrap=True)
    if found["kinds"]:
        table = table_of("kind", "objects", "bytes")
        for kind, each in found["kinds"].items():
            table.add_row(kind, str(each["objects"]), size(each["bytes"]))
        out.print(table)
    out.print(f"  {found['in_use']} objects are in use and stay")
    if found["young"]:
        out.print(f"  {found['young']} more are in no use yet, and too young to be judged")
    if found["objects"] and not found["removed"]:
        out.print("  restitch gc --yes removes them")
