"""The look of what an operator's commands did."""

from rich.console import Console

from restitch.cli.render.formats import Values, write


def up(result: Values, out: Console) -> None:
    """The addresses of the stack's pages."""
    started = ", ".join(result["started"])
    write(out, f"started {started}" if started else "everything was running")
    for change in result["changes"]:
        write(out, f"  {change}")
    for name in result["paused"]:
        write(out, f"  {name}", "yellow")
    write(out, f"Prefect   {result['prefect_url']}")
    write(out, f"MLflow    {result['mlflow_url']}")
    workers = "worker" if result["workers"] == 1 else "workers"
    write(out, f"{result['workers']} {workers}; logs in {result['logs']}")


def down(result: Values, out: Console) -> None:
    """The processes that were stopped."""
    stopped = ", ".join(result["stopped"])
    write(out, f"stopped {stopped}" if stopped else "nothing was running")


def deployed(result: Values, out: Console) -> None:
    """The changes on a Prefect server, its schedules and its pools."""
    for change in result["changes"]:
        write(out, change)
    if not result["changes"]:
        write(out, "nothing to change")
    for line, schedule in result["schedules"].items():
        if schedule["state"] == "unknown":
            write(out, f"schedule of {line}: FAILED: {schedule['text']}", "red")
            write(out, f"  -> {schedule['remedy']}", "red")
        else:
            style = "yellow" if schedule["state"] == "paused" else None
            write(out, f"schedule of {line}: {schedule['text']}", style)
    for name in result["paused"]:
        write(out, f"{name}: paused in Prefect", "yellow")
    for pool in result["pools"]:
        write(out, f"start workers with: prefect worker start --pool {pool} --limit 1")


def doctor(result: Values, out: Console) -> None:
    """Each check, with its remedy."""
    marks = {
        "ok": ("ok", "green"),
        "paused": ("paused", "yellow"),
        "warning": ("look", "yellow"),
        "failed": ("FAILED", "red"),
    }
    for check in result["checks"]:
        mark, style = marks[check["status"]]
        out.print(f"{mark:7}", style=style, end="")
        write(out, f"{check['name']}: {check['found']}")
        if check["remedy"]:
            write(out, f"       -> {check['remedy']}", style)
