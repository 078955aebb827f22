"""The look of numbers, sizes, lines and tables."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from restitch.merging.errors import counted
from restitch.registry.ledger.measurements import recovered_share, shortfall

Values = dict[str, Any]

_PIPE_WIDTH = 10_000
_MOST_NAMES = 5
_BREAKS = {"members", "source", "task", "why", "changed"}
# The interval of a number, the time of a date and the end of a long name may go to the next line.
_MAY_BREAK = _BREAKS | {"retention", "made", "by"}
_LEAST = {"task": None, "retention": 11, "made": 10, "by": 8}
_WORDS = _BREAKS | {"state", "member", "made", "by", "mask", "weights", "time", "act", "verdict"}


def console() -> Console:
    """Standard output; neither wrapped nor cut where it is no terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def write(out: Console, line: str, style: str | None = None) -> None:
    """Print a line as it is; the terminal wraps it."""
    out.print(line, style=style, markup=False, soft_wrap=True)


def show_table(out: Console, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table; columns of words are on the left, numbers on the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        words = column in _WORDS
        # Names may break into lines; numbers and times must not.
        table.add_column(
            column,
            justify="left" if words else "right",
            no_wrap=column not in _MAY_BREAK,
            overflow="fold",
            min_width=_LEAST.get(column, 12 if column in _BREAKS else None),
        )
    for row in rows:
        table.add_row(*map(text, row))
    out.print(table)


def number(value: float | None, form: str = ".3f") -> str:
    """A number, by default with three decimals, or a dash."""
    return "-" if value is None else format(value, form)


def normalized(result: Mapping[str, Any]) -> str:
    """A task's normalized value, or the reason why there is none."""
    gain = result["gain"]
    if gain is not None and gain["verdict"] != "better":
        return "worse than base" if gain["verdict"] == "worse" else "no gain"
    return number(result["normalized"])


def gained(gain: Mapping[str, Any] | None) -> str:
    """What a finetuned model has over the base."""
    if gain is None:
        return "not measured"
    mark = {"better": "", "not better": " (no gain)", "worse": " (worse)"}[gain["verdict"]]
    return f"{gain['difference']:+.3f}{mark}"


def percent(value: float | None) -> str:
    """A fraction as a percentage of three digits."""
    return "-" if value is None else f"{100 * value:.3g} %"


def size(value: int | None) -> str:
    """Bytes with three digits and a unit."""
    if value is None:
        return "-"
    units = ("B", "kB", "MB", "GB", "TB")
    power = min(max(len(str(value)) - 1, 0) // 3, len(units) - 1)
    return f"{value / 1000**power:.3g} {units[power]}"


def text(value: object) -> str:
    """Anything, or a dash."""
    return "-" if value is None else str(value)


def accounted(facts: Values) -> list[str]:
    """A line for each thing in a finetuned model's files that is left out or inferred."""
    lines = []
    if "unused" in facts:
        lines.append(f"not used: {_tensors(facts['unused'])}, which the base lacks")
    if "from_base" in facts:
        lines.append(f"taken from the base: {_tensors(facts['from_base'])}, which it lacks")
    return [*lines, *(f"note: {note}" for note in facts.get("notes", ()))]


def recovered(facts: Values, out: Console, task: str = "") -> None:
    """How much of a finetuned model its delta recovers, if validation rows chose that."""
    found = facts.get("recovery")
    text = recovered_share(found)
    if text is not None:
        write(out, f"  {task}{text}", "yellow" if shortfall(found) else None)


def _tensors(group: Values) -> str:
    """A group of tensors: its number, its share and its first names."""
    more = group["count"] - len(shown := group["names"][:_MOST_NAMES])
    names = ", ".join(shown) + (f" and {more} more" if more else "")
    tensors = counted(group["count"], "tensor")
    return f"{tensors} ({group['weights']:,} weights, {percent(group['share'])}): {names}"


def numbered(members: Mapping[str, Any]) -> str:
    """Tasks with their versions: `colour 2, number 1`."""
    return ", ".join(f"{task} {version}" for task, version in members.items())


def span(interval: Mapping[str, float] | None) -> str:
    """The ends of a 95 % interval."""
    return "-" if interval is None else f"{number(interval['low'])}-{number(interval['high'])}"


def with_half(measured: Mapping[str, Any]) -> str:
    """A value with half of its 95 % interval, for tables with many of them."""
    ends = measured["interval"]
    return f"{number(measured['value'])} ± {(ends['high'] - ends['low']) / 2:.3f}"


def with_interval(value: float | None, interval: Mapping[str, float] | None) -> str:
    """A number with its 95 % interval, if it has one."""
    if value is None or interval is None:
        return number(value)
    return f"{number(value)} ({number(interval['low'])} to {number(interval['high'])})"
