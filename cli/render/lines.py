"""The look of lines: made, changed, remerged, their status, and the results of a version."""

from rich.console import Console

from restitch.cli.render.formats import (
    Values,
    gained,
    normalized,
    number,
    percent,
    show_table,
    size,
    span,
    text,
    with_interval,
    write,
)
from restitch.registry.ledger.line_state import Pause
from restitch.registry.ledger.measurements import density_word, keeps_subspace
from restitch.registry.specs.in_words import changed, setting

MOST_LINES = 10  # of one model's reason

_REMERGED = {
    "unchanged": "nothing changed; version {version} stays",
    "empty": "no model is ready to be merged",
    "waiting": "no merge before all members have new masks; the champion is {champion}",
    "promoted": "version {version} is the champion",
    "rejected": "version {version} did not pass its gates; the champion is {champion}",
    "candidate": "version {version} is a candidate: promotion is switched off",
    "paused": "the line is paused; nothing was merged",
}


def init(result: Values, out: Console) -> None:
    """A new or changed line, with one line of text per changed setting."""
    if result["created"]:
        write(out, f"made line {result['line']} on {result['base']}")
    elif result["changes"] or result["again"]:
        again = " started again: its history goes on" if result["again"] else ""
        write(out, f"{'' if again else 'changed '}line {result['line']}{again}")
        for key, old, new in result["changes"]:
            for line in changed(key, old, new):
                write(out, f"  {line}")
    else:
        write(out, f"line {result['line']} is unchanged")
    weights, tensors = (result["localizable"][key] for key in ("coordinates", "tensors"))
    write(out, f"  localizable: {weights:,} weights in {tensors} tensors")


def declared(result: Values, out: Console) -> None:
    """A task that was declared without a model."""
    write(out, f"{result['line']}: task {result['task']} is {result['action']}")
    if result["waiting"]:
        write(out, f"  the next remerge takes up the waiting version {setting(result['waiting'])}")


def remerged(result: Values, out: Console) -> None:
    """The outcome of a remerge, the held models, and the results of the version."""
    write(out, f"{result['line']}: {_REMERGED[result['action']].format(**result)}")
    for model, checks in result["held"].items():
        write(out, f"  held {model}: {'; '.join(checks)}", "yellow")
    for model, why in result["missing"].items():
        write(out, f"  no new mask of {model}: {why}", "yellow")
    for warning in result["warnings"]:
        write(out, f"  {warning}", "yellow")
    if result["record"] is not None:
        results(result["record"], out)


def status(result: Values, out: Console) -> None:
    """Each line with its models."""
    if not result["lines"]:
        write(out, f"no lines in {result['home']}: make one with `restitch init FILE`")
    for line in result["lines"]:
        _line(line, out)


def _line(line: Values, out: Console) -> None:
    method = _method(line["method"])
    write(out, f"{line['line']}  {line['family']}, {method}, base {line['base']}")
    write(
        out,
        f"  champion {text(line['champion'])}, candidate {text(line['candidate'])}"
        f"{', pinned' if line['pinned'] else ''}"
        f", normalized {number(line['mean_normalized'])}"
        f", retention {with_interval(line['retention'], line['retention_interval'])}",
    )
    if line["paused"] is not None:
        write(out, f"  {paused(line['line'], line['paused'])}", "yellow")
    if line["specialists"] is not None:
        write(out, f"  {of_specialists(line['specialists'])}")
    keeps = density_word(next((m["localizer"] for m in line["models"] if m["localizer"]), None))
    columns = ("task", "version", "state", "gain", "in champion", keeps, "delta", "merged")
    rows = [
        (
            *(model["task"], model["version"], model["state"], _gain(model)),
            "yes" if model["in_champion"] else "",
            *(percent(model["density"]), size(model["delta_bytes"]), number(model["merged"])),
        )
        for model in line["models"]
    ]
    show_table(out, columns, rows)
    if line["without_models"]:
        write(out, f"  declared, without a model: {', '.join(line['without_models'])}")
    for model in line["models"]:
        name = f"{model['task']} {model['version']}"
        if model["newer_mask"] is not None:
            newer = model["newer_mask"]
            what = "subspace" if keeps_subspace(newer["localizer"]) else "mask"
            share = f"{density_word(newer['localizer'])} {percent(newer['density'])}"
            write(out, f"  {name}: the next merge takes its newer {what}, {share}")
        for check, one in model["accepted"].items():
            write(out, f"  {name}: {check} accepted by {one['by']}: {one['reason']}")
        if model["unexpected"] is not None:
            write(out, f"  {name}: {model['unexpected']}", "yellow")
        if model["needed_tensors"] is not None and not model["in_champion"]:
            write(out, f"  {name}: {model['needed_tensors']}", "yellow")
        for note in model["notes"]:
            write(out, f"  {name}: {note}", "yellow")
        if model["shortfall"] is not None:
            write(out, f"  {name}: {model['shortfall']}", "yellow")
        if model["reason"] and model["state"] in ("quarantined", "held", "waiting"):
            reason = _shortened(f"{name}: {model['reason']}")
            write(out, f"  {reason}", "yellow")


def paused(line: str, pause: Values) -> str:
    """A pause of a line, or of its schedule: since when, by whom and why."""
    what = f"the schedule of {line}" if pause["schedule_only"] else line
    return f"{what} is paused {Pause(**pause)}"


def _gain(model: Values) -> str:
    return gained(model["gain"]) if model["measured"] else ""


def of_specialists(specialists: Values) -> str:
    """A version's specialists: for which tasks, their size, who made them and when."""
    sizes, maker = specialists["bytes"], specialists["made_by"] or {}
    tasks = ", ".join(sizes.get("tasks", {}))
    at = specialists["made_at"]
    made = "" if at is None else f", made {at[:19]} UTC"
    by = f" by {maker['actor']}" if "actor" in maker else ""
    all_bytes = size(sizes.get("all"))
    return f"specialists for {tasks} by {specialists['method']}, {all_bytes}{made}{by}"


def results(record: Values, out: Console) -> None:
    """The table of a version's tasks, and its retention."""
    values = ("base", "finetuned", "grafted", "merged")
    rows = [
        (
            *(task, *(number(result[name]) for name in values)),
            *(span(result["interval"]), normalized(result), result["count"]),
        )
        for task, result in record["results"].items()
    ]
    show_table(out, ("task", *values, "95 %", "normalized", "rows"), rows)
    for task, result in record["results"].items():
        for note in result["notes"]:
            write(out, f"  {task}: {note}", "yellow")
    kept = record["retention"]
    if kept is not None:
        write(
            out,
            f"  retention on {kept['task']}: {kept['metric']}"
            f" {with_interval(kept['value'], kept['interval'])}, base {kept['base']:.3f},"
            f" ratio {with_interval(kept['ratio'], kept['ratio_interval'])}"
            f" ({kept['count']} rows)",
        )
        for note in kept.get("notes", ()):
            write(out, f"  {kept['task']}: {note}", "yellow")


def _method(method: Values) -> str:
    if "tournament" not in method:
        return str(method["name"])
    names = ", ".join(one["name"] for one in method["tournament"])
    most = method.get("at_most")
    return f"the best of {names}" + ("" if most is None else f", at most {most} at each merge")


def _shortened(reason: str) -> str:
    """A reason without the middle of a long list; its last line says what to do."""
    lines = reason.splitlines()
    if len(lines) <= MOST_LINES:
        return reason
    left_out = f"  ... and {len(lines) - MOST_LINES + 1} more lines, see --json"
    return "\n".join([*lines[: MOST_LINES - 2], left_out, lines[-1]])
