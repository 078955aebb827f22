"""The look of purges: what would go, and what went."""

from rich.console import Console

from restitch.cli.render.audit import decided
from restitch.cli.render.formats import Values, size, write
from restitch.cli.render.lines import remerged
from restitch.registry.specs.in_words import setting


def plan(result: Values, out: Console) -> None:
    """The consequences of a purge, before it is made."""
    write(out, f"{result['line']}: a purge cannot be undone. It deletes:")
    write(out, f"  the weights of {', '.join(result['models']) or 'no further model'}")
    write(out, f"  {result['objects']} objects, {size(result['bytes'])}")
    if result["versions"]:
        listed = setting(result["versions"])
        write(out, f"  merged versions that hold them: {listed}", "yellow")
        write(out, "  these can then not be exported, rebuilt or rolled back to", "yellow")
    if result["champion"] is not None:
        text = f"  version {result['champion']} is in use; a merge without the models comes first"
        write(out, text)
    for note in result["notes"]:
        write(out, f"  {note}", "yellow")


def purged(result: Values, out: Console) -> None:
    """A purge and its effects."""
    decided(result["decision"], out)
    if result["merged"] is not None:
        remerged(result["merged"], out)
    line = result["line"]
    if result["entry"] is None:
        write(out, f"{line}: nothing new to purge")
    else:
        write(out, f"{line}: purged {', '.join(result['models']) or 'no further model'}")
    if result["versions"]:
        write(out, f"  the weights of version {setting(result['versions'])} are gone")
    write(out, f"  {result['objects']} objects removed, {size(result['bytes'])}")
    for note in result["notes"]:
        write(out, f"  {note}", "yellow")
