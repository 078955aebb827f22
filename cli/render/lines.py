"""How results look in a terminal: one function per command, from the same values as `--json`."""

from typing import Any

from rich.console import Console

from restitch.cli.render.formats import number, percent, size, table_of, text, with_interval

Values = dict[str, Any]
MOST_LINES = 10  # of one model's reason


def init(found: Values, out: Console) -> None:
    """What `init` did."""
    localizable = found["localizable"]
    if found["created"]:
        out.print(f"made line {found['line']} on {found['base']}", markup=False, soft_wrap=True)
    elif found["changes"]:
        out.print(f"changed line {found['line']}", markup=False, soft_wrap=True)
        for key, old, new in found["changes"]:
            out.print(f"  {key}: {old} -> {new}", markup=False, soft_wrap=True)
    else:
        out.print(f"line {found['line']} is as its file says", markup=False, soft_wrap=True)
    out.print(
        f"  localizable: {localizable['coordinates']:,} weights in {localizable['tensors']} tensors"
    )


def registered(found: Values, out: Console) -> None:
    """What became of a registered model."""
    already = "already " if found["already"] else ""
    out.print(f"{found['task']}: {already}version {found['version']}, {found['state']}")
    if found["reason"]:
        out.print(found["reason"], style="yellow", markup=False, soft_wrap=True)
    _facts(found["facts"], out)
    if found["merged"] is not None:
        remerged(found["merged"], out)
    elif found["record"] is not None:
        out.print(f"{found['line']}: version {found['champion']} is the champion", markup=False)
        results(found["record"], out)
    elif found["handed_over"] and found["state"] in ("registered", "ready"):
        out.print("  the workers take over: `restitch status --watch` follows them")


def declared(found: Values, out: Console) -> None:
    """What became of a task without a model."""
    says = {
        "declared": "is declared",
        "changed": "is described anew",
        "unchanged": "is as its file says",
    }
    done = f"{found['line']}: task {found['task']} {says[found['action']]}"
    out.print(done, markup=False, soft_wrap=True)
    if found["waiting"]:
        versions = ", ".join(map(str, found["waiting"]))
        out.print(f"  the next remerge looks at what waits: version {versions}", markup=False)


def remerged(found: Values, out: Console) -> None:
    """What a remerge did."""
    says = {
        "unchanged": "nothing changed; version {version} stays as it is",
        "empty": "no model is ready to be merged",
        "promoted": "version {version} is the champion",
        "rejected": "version {version} failed its gates; the champion is {champion}",
        "candidate": "version {version} is a candidate: promotion is switched off",
    }
    out.print(
        f"{found['line']}: {says[found['action']].format(**found)}", markup=False, soft_wrap=True
    )
    for model, checks in found["held"].items():
        out.print(
            f"  held {model}: {'; '.join(checks)}", style="yellow", markup=False, soft_wrap=True
        )
    if found["record"] is not None:
        results(found["record"], out)


def _method(found: Values) -> str:
    if "tournament" not in found:
        return str(found["name"])
    names = ", ".join(one["name"] for one in found["tournament"])
    most = found.get("at_most")
    return f"the best of {names}" + ("" if most is None else f", at most {most} at each merge")


def status(found: Values, out: Console) -> None:
    """The present of lines."""
    if not found["lines"]:
        out.print(
            f"no lines in {found['home']}: make one with `restitch init FILE`",
            markup=False,
            soft_wrap=True,
        )
    for line in found["lines"]:
        method = _method(line["method"])
        out.print(
            f"{line['line']}  {line['family']}, {method}, base {line['base']}",
            markup=False,
            soft_wrap=True,
        )
        out.print(
            f"  champion {text(line['champion'])}, candidate {text(line['candidate'])}"
            f"{', pinned' if line['pinned'] else ''}"
            f", normalized {number(line['mean_normalized'])}"
            f", retention {with_interval(line['retention'], line['retention_interval'])}",
            markup=False,
        )
        if line["specialists"] is not None:
            out.print(f"  {of_specialists(line['specialists'])}", markup=False, soft_wrap=True)
        table = table_of("task", "version", "state", "in champion", "density", "delta", "merged")
        for model in line["models"]:
            table.add_row(
                model["task"],
                str(model["version"]),
                model["state"],
                "yes" if model["in_champion"] else "",
                percent(model["density"]),
                size(model["delta_bytes"]),
                number(model["merged"]),
            )
        out.print(table)
        if line["without_models"]:
            names = ", ".join(line["without_models"])
            out.print(f"  declared, without a model: {names}", markup=False, soft_wrap=True)
        for model in line["models"]:
            if model["reason"] and model["state"] in ("quarantined", "held", "waiting"):
                why = _shortened(f"{model['task']} {model['version']}: {model['reason']}")
                out.print(f"  {why}", style="yellow", markup=False, soft_wrap=True)


def of_specialists(found: Values) -> str:
    """Which specialists a version has, what they take, and who made them when."""
    room, maker = found["bytes"], found["made_by"] or {}
    tasks = ", ".join(room.get("tasks", {}))
    made = "" if found["made_at"] is None else f", made {found['made_at'][:19]} UTC"
    by = f" by {maker['actor']}" if "actor" in maker else ""
    return f"specialists for {tasks} by {found['method']}, {size(room.get('all'))}{made}{by}"


def evaluated(found: Values, out: Console) -> None:
    """What a version reaches now."""
    out.print(f"{found['line']} version {found['version']}")
    results(found, out)


def exported(found: Values, out: Console) -> None:
    """What was written."""
    whose = "" if found["task"] is None else f", the specialist for {found['task']},"
    out.print(
        f"{found['line']} version {found['version']}{whose} is in {found['out']}",
        markup=False,
        soft_wrap=True,
    )
    out.print(f"  {len(found['files'])} files, {size(found['bytes'])}")


def up(found: Values, out: Console) -> None:
    """Where the stack's pages are."""
    started = ", ".join(found["started"])
    out.print(f"started {started}" if started else "everything was up", markup=False)
    for change in found["changes"]:
        out.print(f"  {change}", markup=False, soft_wrap=True)
    out.print(f"Prefect   {found['prefect_url']}", markup=False)
    out.print(f"MLflow    {found['mlflow_url']}", markup=False)
    workers = "worker" if found["workers"] == 1 else "workers"
    out.print(
        f"{found['workers']} {workers}; logs in {found['logs']}", markup=False, soft_wrap=True
    )


def down(found: Values, out: Console) -> None:
    """What was stopped."""
    stopped = ", ".join(found["stopped"])
    out.print(f"stopped {stopped}" if stopped else "nothing was up", markup=False, soft_wrap=True)


def deployed(found: Values, out: Console) -> None:
    """What a Prefect server was brought to."""
    for change in found["changes"]:
        out.print(change, markup=False, soft_wrap=True)
    if not found["changes"]:
        out.print("everything was there")
    for line, cron in found["schedules"].items():
        out.print(f"line {line} is remerged at {cron}", markup=False)
    for pool in found["pools"]:
        out.print(f"workers: prefect worker start --pool {pool} --limit 1", markup=False)


def doctor(found: Values, out: Console) -> None:
    """One line per check, with what to do."""
    marks = {"ok": ("ok", "green"), "warning": ("look", "yellow"), "failed": ("FAILED", "red")}
    for check in found["checks"]:
        mark, style = marks[check["status"]]
        out.print(f"{mark:7}", style=style, end="")
        out.print(f"{check['name']}: {check['found']}", markup=False, soft_wrap=True)
        if check["mend"]:
            out.print(f"       -> {check['mend']}", style=style, markup=False, soft_wrap=True)


def results(found: Values, out: Console) -> None:
    """The table per task, and the retention."""
    table = table_of("task", "base", "finetuned", "grafted", "merged", "95 %", "normalized", "rows")
    for task, result in found["results"].items():
        interval = result["interval"]
        table.add_row(
            task,
            *(number(result[name]) for name in ("base", "finetuned", "grafted", "merged")),
            "" if interval is None else f"{interval['low']:.3f}-{interval['high']:.3f}",
            number(result["normalized"]),
            text(result["count"]),
        )
    out.print(table)
    kept = found["retention"]
    if kept is not None:
        out.print(
            f"  retention on {kept['task']}: top-1"
            f" {with_interval(kept['top1'], kept['interval'])}, base {kept['base_top1']:.3f},"
            f" ratio {with_interval(kept['ratio'], kept['ratio_interval'])}"
            f" ({kept['count']} rows)",
            markup=False,
            soft_wrap=True,
        )


def _shortened(reason: str) -> str:
    """A reason without the middle of a long list of details; its last line says what to do."""
    lines = reason.splitlines()
    if len(lines) <= MOST_LINES:
        return reason
    left_out = f"  ... and {len(lines) - MOST_LINES + 1} lines more, which --json shows"
    return "\n".join([*lines[: MOST_LINES - 2], left_out, lines[-1]])


def _facts(facts: Values, out: Console) -> None:
    if "localizer" not in facts:
        return
    beside = ""
    if "statistics" in facts:
        beside = f" {' and '.join(facts['statistics'])} {size(facts['statistics_bytes'])},"
    out.print(
        f"  {facts['localizer']}: {facts['kept']:,} of {facts['coordinates']:,} weights"
        f" ({percent(facts['density'])}), delta {size(facts['delta_bytes'])},{beside}"
        f" {facts['outside_share']:.1%} of the change is outside of masks",
        markup=False,
    )
