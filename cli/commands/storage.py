"""Commands about the store itself, and not about one line in it."""

from typing import Annotated, Any

import typer
from rich.console import Console

from restitch.cli.app import Json, app, show_result
from restitch.cli.render.formats import size

store = typer.Typer(
    name="store",
    help="Move an installation between stores.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(store)

Address = "A folder, as RESTITCH_HOME/store, or s3://bucket/prefix."


@store.command()
def copy(
    source: Annotated[str, typer.Argument(metavar="FROM", help=Address)],
    target: Annotated[str, typer.Argument(metavar="TO", help=Address)],
    as_json: Json = False,
) -> None:
    """Copy a store into an empty one, or go on with a copy that was interrupted.

    Every object is compared with its digest on its way; heads are written last.
    """
    from restitch.flows.storage.store_copy import copy_store

    show_result(copy_store(source, target).as_dict(), as_json, _copied)


def _copied(found: dict[str, Any], out: Console) -> None:
    out.print(f"{found['target']}: lines {', '.join(found['lines'])}", soft_wrap=True)
    out.print(
        f"  {found['copied']} objects copied ({size(found['bytes'])}), {found['there']} were there"
    )
