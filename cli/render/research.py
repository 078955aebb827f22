"""The look of comparisons, specialists, analyses and studies."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from restitch.cli.render.formats import (
    Values,
    number,
    numbered,
    percent,
    size,
    table_of,
    text,
    with_half,
    with_interval,
    write,
)

# A terminal has 80 columns; a wider table leaves the values by task to CSV and JSON.
MOST_COLUMNS = 8


def compared(result: Values, out: Console) -> None:
    """The methods of either kind, the best first, then each task with its interval."""
    rows, experts = result["methods"], result["experts"]
    members = numbered(result["members"])
    write(out, f"{result['line']}: {len(rows) + len(experts)} methods on {members}")
    if rows:
        table = table_of("method", "mean", "normalized", "retention", "seconds", "memory", "stored")
        for row in rows:
            retention = row["retention"] or {}
            table.add_row(
                row["method"],
                number(row["mean_accuracy"]),
                number(row["mean_normalized"]),
                with_interval(retention.get("ratio"), retention.get("ratio_interval")),
                _seconds(row),
                size(row["memory"]),
                size(row["stored_bytes"]),
            )
        out.print(table)
    if experts:
        _experts(experts, out)
    for row in (*rows, *experts):
        settings = _settings(row) or "no settings"
        write(out, f"  {row['method']} merges {row['needs']}: {settings}")
    if rows:
        _by_task(rows, result["members"], "merged", out)
    if experts:
        _by_task(experts, result["members"], "expert", out)


def specialists(result: Values, out: Console) -> None:
    """The specialists of a version, their accuracy and their size."""
    write(
        out,
        f"{result['line']} {result['version']}: specialists of {numbered(result['members'])}"
        f" by {result['method']} ({_settings(result) or 'no settings'})",
    )
    _by_task([result], result["members"], "expert", out, reference="grafted")
    sizes = result["bytes"]
    table = table_of("what", "bytes")
    table.add_row("shared by all", size(sizes["shared"]))
    for task, part in sizes["tasks"].items():
        table.add_row(task, size(part))
    table.add_row("together", size(sizes["all"]))
    table.add_row("with the base", size(sizes["all"] + sizes["base"]))
    table.add_row("all finetuned models", size(sizes["models"]))
    out.print(table)


def analyzed(result: Values, out: Console) -> None:
    """The curves of each task, the pair, and what the masks share."""
    write(out, f"{result['line']} {result['version']}: {numbered(result['members'])}")
    for task, curves in result["tasks"].items():
        _curves(task, curves, out)
    if result["pair"] is not None:
        _pair(result["pair"], out)
    _masks(result["masks"], out)


def studied(result: Values, out: Console) -> None:
    """The table of a study, and its notes."""
    members = numbered(result["members"])
    write(out, f"{result['line']} {result['version']}, {result['about']}: {members}")
    columns = [name for name in result["columns"] if name not in result["details"]]
    if len(columns) > MOST_COLUMNS:
        columns = [name for name in columns if name not in result["members"]]
    table = table_of(*columns)
    for row in result["rows"]:
        cells = (row[column] for column in columns)
        table.add_row(*(f"{one:.4g}" if isinstance(one, float) else text(one) for one in cells))
    out.print(table)
    for note in result["notes"]:
        write(out, f"  {note}")


def _experts(rows: Sequence[Values], out: Console) -> None:
    """Methods with one model per task: the size of all specialists, against the models."""
    table = table_of("experts", "mean", "normalized", "bytes", "of models", "seconds", "memory")
    for row in rows:
        sizes = row["bytes"]
        table.add_row(
            row["method"],
            number(row["mean_accuracy"]),
            number(row["mean_normalized"]),
            size(sizes["all"]),
            percent(sizes["all"] / sizes["models"] if sizes["models"] else None),
            _seconds(row),
            size(row["memory"]),
        )
    out.print(table)


def _by_task(
    rows: Sequence[Values],
    tasks: Mapping[str, Any],
    name: str,
    out: Console,
    reference: str = "base",
) -> None:
    """Each task's value `name` with its interval, next to the reference and the finetuned model."""
    table = table_of("method", "task", name, "95 %", "normalized", reference, "finetuned")
    for row in rows:
        for task in tasks:
            values = row["results"][task]
            interval = values.get("interval")
            table.add_row(
                row["method"],
                task,
                number(values.get(name)),
                "-"
                if interval is None
                else f"{number(interval['low'])}-{number(interval['high'])}",
                *(number(values.get(other)) for other in ("normalized", reference, "finetuned")),
            )
    out.print(table)


def _curves(task: str, result: Values, out: Console) -> None:
    ends = ", ".join(f"{name} {number(result[name]['value'])}" for name in ("base", "finetuned"))
    own = f"in use {number(result['own']['value'])} at {percent(result['own']['density'])}"
    write(out, f"\n{task}, grafted {result['metric']}: {ends}, {own}")
    curves = result["curves"].values()
    if not curves:
        return
    table = table_of("kept", *result["curves"])
    for points in zip(*(curve["points"] for curve in curves), strict=True):
        cells = (with_half(point["value"], point["interval"]) for point in points)
        table.add_row(percent(points[0]["density"]), *cells)
    out.print(table)


def _pair(pair: Values, out: Console) -> None:
    tasks, localizer = pair["tasks"], pair["localizers"][0]
    write(out, f"\n{' and '.join(tasks)}, merged by {pair['method']}, masks by {localizer}")
    table = table_of("density", "shared", "share", "mean", *tasks)
    for row in [*pair["points"], {**pair["averaging"], "density": None}]:
        values = (row["tasks"][task] for task in tasks)
        table.add_row(
            "averaging" if row["density"] is None else percent(row["density"]),
            text(row.get("shared")),
            percent(row.get("share")),
            number(row["mean"]),
            *(with_half(value["value"], value["interval"]) for value in values),
        )
    out.print(table)


def _masks(masks: Values, out: Console) -> None:
    tasks = masks["tasks"]
    for name, title in (
        ("jaccard", "Jaccard index of the masks"),
        ("cosine", "cosine of the masked task vectors"),
    ):
        write(out, f"\n{title}")
        table = table_of("task", *tasks)
        for task, row in zip(tasks, masks[name], strict=True):
            table.add_row(task, *(number(value) for value in row))
        out.print(table)
    write(out, "\ncoordinates by the number of members that keep them")
    table = table_of("owners", "coordinates")
    for owners, count in enumerate(masks["owners"], 1):
        table.add_row(str(owners), f"{count:,}")
    out.print(table)
    places = masks["places"]
    for name, group in (("component", "components"), ("layer", "layers")):
        write(out, f"\nshare of the masks by {name}")
        table = table_of(name, *tasks, "all weights")
        shares = [places[f"by_{name}"]["tasks"][task] for task in tasks]
        for part in places[group]:
            columns = (*shares, places[f"by_{name}"]["all"])
            table.add_row(part, *(percent(share.get(part, 0.0)) for share in columns))
        out.print(table)


def _seconds(row: Values) -> str:
    """The seconds that the merge took; a dash if it came from the store."""
    return "-" if row["seconds"] is None else f"{row['seconds']:.1f}"


def _settings(row: Values) -> str:
    """The settings of a method, the tuned one first."""
    tuned = row["tuned"]["setting"] if row["tuned"] else None
    first = [f"{tuned} {_value(row['settings'][tuned])} (tuned)"] if tuned else []
    others = (f"{key} {_value(value)}" for key, value in row["settings"].items() if key != tuned)
    return ", ".join([*first, *others])


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{task}={each}" for task, each in value.items())
    return str(value)
