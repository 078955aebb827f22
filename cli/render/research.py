"""The look of comparisons, specialists, analyses and studies."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from restitch.cli.render.formats import (
    Values,
    number,
    numbered,
    percent,
    show_table,
    size,
    span,
    with_half,
    with_interval,
    write,
)
from restitch.merging.errors import counted

# A terminal has 80 columns; a wider table leaves the values by task to CSV and JSON.
MOST_COLUMNS = 8


def compared(result: Values, out: Console) -> None:
    """The methods of either kind, the best first, then each task with its interval."""
    rows, experts = result["methods"], result["experts"]
    members = numbered(result["members"])
    write(out, f"{result['line']}: {len(rows) + len(experts)} methods on {members}")
    if rows:
        columns = ("method", "mean", "normalized", "retention", "seconds", "memory", "stored")
        show_table(out, columns, map(_method_row, rows))
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
    parts = {
        "shared by all": sizes["shared"],
        **sizes["tasks"],
        "together": sizes["all"],
        "with the base": sizes["all"] + sizes["base"],
        "all finetuned models": sizes["models"],
    }
    show_table(out, ("what", "bytes"), ((name, size(part)) for name, part in parts.items()))


def analyzed(result: Values, out: Console) -> None:
    """The curves of each task, the pair, and what the masks share."""
    write(out, f"{result['line']} {result['version']}: {numbered(result['members'])}")
    for task, curves in result["tasks"].items():
        _curves(task, curves, out)
    if result["pair"] is not None:
        _pair(result["pair"], out)
    _masks(result["masks"], out)


def paired(result: Values, out: Console) -> None:
    """The signals of each pair with its loss, and how each signal predicts it."""
    members = numbered(result["members"])
    write(
        out, f"{result['line']} {result['version']}, pairs merged by {result['method']}: {members}"
    )
    signals = list(result["correlations"])
    heads = [signal.replace("_", " ") for signal in signals]
    rows = [
        (
            " + ".join(pair["tasks"]),
            *(number(pair[s]) for s in signals),
            number(pair["loss"], "+.3f"),
        )
        for pair in sorted(result["pairs"], key=lambda pair: -pair["loss"])
    ]
    show_table(out, ("task", *heads, "loss"), rows)
    write(
        out,
        "  loss: mean of what both tasks lose against their deltas alone, of the finetuned value",
    )
    for signal, head in zip(signals, heads, strict=True):
        found = result["correlations"][signal]
        if found["rho"] is None:
            write(out, f"  {head}: no rank correlation from {counted(found['pairs'], 'pair')}")
        else:
            write(
                out,
                f"  {head}: rank correlation with the loss {found['rho']:+.2f}"
                f" (p = {found['p_value']:.2g}, {found['pairs']} pairs)",
            )


def studied(result: Values, out: Console) -> None:
    """The table of a study, and its notes."""
    members = numbered(result["members"])
    write(out, f"{result['line']} {result['version']}, {result['about']}: {members}")
    columns = [name for name in result["columns"] if name not in result["details"]]
    if len(columns) > MOST_COLUMNS:
        columns = [name for name in columns if name not in result["members"]]
    cells = ([row[column] for column in columns] for row in result["rows"])
    rows = ([f"{one:.4g}" if isinstance(one, float) else one for one in row] for row in cells)
    show_table(out, columns, rows)
    for note in result["notes"]:
        write(out, f"  {note}")


def paper_plan(plan: Values, out: Console) -> None:
    """What the study of a paper needs, and how each number is estimated."""
    write(out, f"{plan['paper']}: {plan['about']}, on the line {plan['line']}")
    done, todo = plan["registered"], plan["to_register"]
    write(out, f"  models: {len(done)} registered, {len(todo)} to register")
    for task, source in todo.items():
        write(out, f"    {task}: {source}")
    tuned = ", tuned on validation rows" if plan["tuned"] else ""
    write(out, f"  methods: {', '.join(plan['methods'])}{tuned}")
    titles = {
        "disk": "disk space",
        "memory": f"memory on {plan['device']}, without the activations of a batch",
    }
    for name, title in titles.items():
        total = sum(part["size"] for part in plan[name])
        write(out, f"  {title}: at most {size(total)}, {size(plan[f'{name}_free'])} free")
        for part in plan[name]:
            write(out, f"    {part['what']}: {size(part['size'])} ({part['how']})")
    hours = plan["rows"] * plan["row_seconds"] / 3600
    write(
        out,
        f"  hours: {hours:.2g} to evaluate {plan['rows']:,} rows at {plan['row_seconds']:.2g} s",
    )
    write(out, f"    a row: measured on {plan['measured']}")
    write(
        out,
        "    rows: the test rows by all models and methods, from the beginning; fetching, "
        "statistics and merging are not in it",
    )
    if done:
        write(out, "  what is done already needs nothing again")
    if sum(part["size"] for part in plan["disk"]) > plan["disk_free"]:
        write(out, "  there may not be enough disk space", "yellow")


def paper_table(result: Values, out: Console) -> None:
    """The table of a paper: what was published on these models next to what was measured here."""
    members = numbered(result["members"])
    tuned = ", tuned on validation rows" if result["tuned"] else ""
    write(out, f"{result['paper']}: {result['about']}{tuned}: {members}")
    columns = {"published": "published", "mean": "here", "normalized": "normalized"}
    experts = [row for row in result["rows"] if row["kind"] == "experts"]
    others = [row for row in result["rows"] if row["kind"] != "experts"]
    measured = {} if all(row["benchmark"] is None for row in others) else _OF_BENCHMARK
    _paper_rows("method", columns | measured, others, out)
    if experts:
        _paper_rows("one model per task", columns, experts, out)
    write(out, "  means over the tasks, in percent")
    for source in result["sources"]:
        write(out, f"  published {source}")
    for row in result["rows"]:
        if row["published_benchmark"] is not None:
            write(out, f"  {row['name']} on the benchmark: {row['published_benchmark']} published")
    for row in result["rows"]:
        if row["settings"]:
            write(out, f"  {row['method']} here: {row['settings']}")
    for source, others in result["elsewhere"].items():
        write(out, f"\npublished elsewhere, not to be compared with the rows above: {source}")
        cells = [(row["name"], _one_digit(row["published"])) for row in others]
        show_table(out, ("method", "published"), cells)
    for name, without in result["left_out"].items():
        write(out, f"  {name} is left out: no train rows for {', '.join(without)}")
    for note in result["notes"]:
        write(out, f"  {note}")


_OF_BENCHMARK = {"benchmark": "benchmark", "retention": "retention"}


def _paper_rows(
    what: str, columns: Mapping[str, str], rows: Sequence[Values], out: Console
) -> None:
    cells = ((row["name"], *(_one_digit(row[key]) for key in columns)) for row in rows)
    show_table(out, (what, *columns.values()), cells)


def _one_digit(value: float | None) -> str:
    return number(value, ".1f")


def _experts(rows: Sequence[Values], out: Console) -> None:
    """Methods with one model per task: the size of all specialists, against the models."""
    lines = []
    for row in rows:
        sizes = row["bytes"]
        share = percent(sizes["all"] / sizes["models"] if sizes["models"] else None)
        *means, seconds, memory = _costs(row)
        lines.append((row["method"], *means, size(sizes["all"]), share, seconds, memory))
    columns = ("experts", "mean", "normalized", "bytes", "of models", "seconds", "memory")
    show_table(out, columns, lines)


def _by_task(
    rows: Sequence[Values],
    tasks: Mapping[str, Any],
    name: str,
    out: Console,
    reference: str = "base",
) -> None:
    """Each task's value `name` with its interval, next to the reference and the finetuned model."""
    others = ("normalized", reference, "finetuned")
    lines = []
    for row in rows:
        for task in tasks:
            values = row["results"][task]
            measured = (number(values.get(name)), span(values.get("interval")))
            lines.append(
                (row["method"], task, *measured, *(number(values.get(one)) for one in others))
            )
    show_table(out, ("method", "task", name, "95 %", *others), lines)


def _curves(task: str, result: Values, out: Console) -> None:
    ends = ", ".join(f"{name} {number(result[name]['value'])}" for name in ("base", "finetuned"))
    own = f"in use {number(result['own']['value'])} at {percent(result['own']['density'])}"
    write(out, f"\n{task}, grafted {result['metric']}: {ends}, {own}")
    if curves := result["curves"]:
        rows = [
            (percent(points[0]["density"]), *map(with_half, points))
            for points in zip(*(curve["points"] for curve in curves.values()), strict=True)
        ]
        show_table(out, ("kept", *curves), rows)


def _pair(pair: Values, out: Console) -> None:
    tasks, localizer = pair["tasks"], pair["localizers"][0]
    write(out, f"\n{' and '.join(tasks)}, merged by {pair['method']}, masks by {localizer}")
    rows = [
        (
            "averaging" if row is pair["averaging"] else percent(row["density"]),
            *(row.get("shared"), percent(row.get("share")), number(row["mean"])),
            *(with_half(row["tasks"][task]) for task in tasks),
        )
        for row in (*pair["points"], pair["averaging"])
    ]
    show_table(out, ("density", "shared", "share", "mean", *tasks), rows)


def _masks(masks: Values, out: Console) -> None:
    tasks = masks["tasks"]
    what = "subspaces" if "overlap" in masks else "masks"
    for name, title in (
        ("jaccard", "Jaccard index of the masks"),
        ("overlap", "overlap of the subspaces"),
        ("cosine", f"cosine of the {'masked ' if what == 'masks' else ''}task vectors"),
    ):
        if name not in masks:
            continue
        write(out, f"\n{title}")
        pairs = zip(tasks, masks[name], strict=True)
        show_table(out, ("task", *tasks), ((task, *map(number, row)) for task, row in pairs))
    if what == "masks":
        write(out, "\ncoordinates by the number of members that keep them")
        rows = [(owners, f"{count:,}") for owners, count in enumerate(masks["owners"], 1)]
        show_table(out, ("owners", "coordinates"), rows)
    places = masks["places"]
    for name, group in (("component", "components"), ("layer", "layers")):
        write(out, f"\nshare of the {what} by {name}")
        by_part = places[f"by_{name}"]
        shares = (*(by_part["tasks"][task] for task in tasks), by_part["all"])
        parts = [(part, *(percent(one.get(part, 0.0)) for one in shares)) for part in places[group]]
        show_table(out, (name, *tasks, "all weights"), parts)


def _method_row(row: Values) -> tuple[str, ...]:
    retention = row["retention"] or {}
    ratio = with_interval(retention.get("ratio"), retention.get("ratio_interval"))
    *means, seconds, memory = _costs(row)
    return (row["method"], *means, ratio, seconds, memory, size(row["stored_bytes"]))


def _costs(row: Values) -> tuple[str, ...]:
    """Mean, normalized mean, seconds and memory; a merge from the store took no seconds."""
    means = (number(row["mean_accuracy"]), number(row["mean_normalized"]))
    return (*means, number(row["seconds"], ".1f"), size(row["memory"]))


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
