"""Format the numbers of the report, and mark each with its path in the JSON.

Integers and numbers from ten thousand on have no decimals; all others have four, or scientific
notation where four decimals would show zero. Every number on the page is a `<span>` with its full
value in `data-value` and its JSON path in `data-field`, so that a program can check it.
"""

import json
from typing import Any

from markupsafe import Markup

MISSING = Markup('<span class="missing" title="not measured">&ndash;</span>')


def number(value: float) -> str:
    """A number, formatted for reading."""
    if isinstance(value, int) or abs(value) >= 10_000:
        return f"{value:,.0f}"
    if value and abs(value) < 0.00005:
        return f"{value:.1e}"
    return f"{value:.4f}"


class Numbers:
    """Formats numbers by their path in the JSON values of a report."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def find(self, *path: str | int) -> Any:
        """The value at a path, or None."""
        value: Any = self._values
        for key in path:
            if isinstance(value, dict):
                value = value.get(key)
            elif isinstance(value, list) and isinstance(key, int) and key < len(value):
                value = value[key]
            else:
                return None
        return value

    def __call__(self, *path: str | int) -> Markup:
        """The number at a path as an HTML element; a dash if it was not measured."""
        value = self.find(*path)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return MISSING
        field = ".".join(map(str, path))
        return _SPAN.format(field, json.dumps(value), number(value))

    def interval(self, *path: str | int) -> Markup:
        """The interval at a path as HTML: `low` to `high`."""
        if self.find(*path) is None:
            return MISSING
        return Markup("{} to {}").format(self(*path, "low"), self(*path, "high"))


_SPAN = Markup('<span class="n" data-field="{}" data-value="{}">{}</span>')
