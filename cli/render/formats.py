"""How numbers, sizes and tables look in a terminal, in one place."""

from collections.abc import Mapping

from rich.table import Table

_BREAKS = {"members", "source", "task", "why", "changed"}
_MEASURED = {"retention"}  # a number, and its interval on the next line where it must
_LEAST = {"task": None, "retention": 11}
_WORDS = _BREAKS | {"state", "member", "made", "by", "mask", "weights", "time", "act", "verdict"}


def table_of(*columns: str) -> Table:
    """An empty table; columns of words are on the left, numbers on the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        words = column in _WORDS
        # Names may break into lines; a number or a time that does is not one any more.
        table.add_column(
            column,
            justify="left" if words else "right",
            no_wrap=column not in _BREAKS | _MEASURED,
            min_width=_LEAST.get(column, 12 if column in _BREAKS else None),
        )
    return table


def number(value: float | None) -> str:
    """Three decimals."""
    return "-" if value is None else f"{value:.3f}"


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


def with_half(value: float, interval: Mapping[str, float]) -> str:
    """A number with half of its 95 % interval, where a table has many of them."""
    return f"{number(value)} ± {(interval['high'] - interval['low']) / 2:.3f}"


def with_interval(value: float | None, interval: Mapping[str, float] | None) -> str:
    """A number with its 95 % interval, where it has one."""
    if value is None or interval is None:
        return number(value)
    return f"{number(value)} ({number(interval['low'])} to {number(interval['high'])})"
