"""The look of what the store's commands did."""

from rich.console import Console

from restitch.cli.render.formats import Values, show_table, size, write


def copied(result: Values, out: Console) -> None:
    """The copied lines and objects."""
    write(out, f"{result['target']}: lines {', '.join(result['lines'])}")
    many, much = result["copied"], size(result["bytes"])
    write(out, f"  {many} objects copied ({much}), {result['there']} were there already")


def collected(result: Values, out: Console) -> None:
    """The objects that nothing refers to, by kind."""
    action = "removed" if result["removed"] else "would be removed"
    write(out, f"{result['objects']} objects {action} ({size(result['bytes'])})")
    if result["kinds"]:
        kinds = result["kinds"].items()
        rows = [(kind, each["objects"], size(each["bytes"])) for kind, each in kinds]
        show_table(out, ("kind", "objects", "bytes"), rows)
    write(out, f"  {result['in_use']} objects are in use and stay")
    if result["young"]:
        age = f"{result['older_than'] / 3600:g} hours"
        write(
            out, f"  {result['young']} more are not in use, but younger than {age} (--older-than)"
        )
    if result["objects"] and not result["removed"]:
        write(out, "  restitch gc --yes removes them")
