"""Commands about the store itself."""

from typing import Annotated

import typer

from restitch.cli.app import Json, show_result
from restitch.cli.render import storage as render

store = typer.Typer(
    name="store",
    help="Move an installation between stores.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Address = "A folder, such as RESTITCH_HOME/store, or s3://bucket/prefix."


@store.command()
def copy(
    source: Annotated[str, typer.Argument(metavar="FROM", help=Address)],
    target: Annotated[str, typer.Argument(metavar="TO", help=Address)],
    as_json: Json = False,
) -> None:
    """Copy a store into an empty one, or continue an interrupted copy.

    Every object is compared with its digest; the lines' states are written last.
    """
    from restitch.flows.storage.store_copy import copy_store

    show_result(copy_store(source, target), as_json, render.copied)


def gc(
    older_than: Annotated[
        str, typer.Option(metavar="AGE", help="Keep younger objects; such as 24h, 90m or 7d.")
    ] = "24h",
    yes: Annotated[bool, typer.Option("--yes", help="Remove them.")] = False,
    as_json: Json = False,
) -> None:
    """List the objects that nothing in the store refers to, and with --yes remove them.

    Everything that a line, one of its versions or an audit entry names stays.
    """
    from restitch.flows.storage.gc import collect
    from restitch.registry.sizes import parse_age

    show_result(collect(parse_age(older_than), remove=yes), as_json, render.collected)
