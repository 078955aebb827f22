"""The one way in which the report writes a number, and the way back to where it came from.

Whole numbers and those from ten thousand on stand without decimals, all others with four, or in
two digits and a power of ten where four would make them zero. On the page every number is a
`<span>` with its full value in `data-value` and its path in the JSON in `data-field`, so that a
program can compare the two.
"""

import json
from typing import Any

from markupsafe import Markup

MISSING = Markup('<span class="missing" title="not measured">&ndash;</span>')


def number(value: float) -> str:
    """A number as people read it."""
    if isinstance(value, int) or abs(value) >= 10_000:
        return f"{value:,.0f}"
    if value and abs(value) < 0.00005:
        return f"{value:.1e}"
    return f"{value:.4f}"


class Numbers:
    """Numbers by their path in the JSON values of a report.

    Args:
        values: the JSON values of the version, with further ones beside them.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def find(self, *path: str | int) -> Any:
        """The value at a path; None where there is none."""
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
        """The number at a path as an element of the page; a dash where it was not measured."""
        value = self.find(*path)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return MISSING
        field = ".".join(map(str, path))
        return _SPAN.format(field, json.dumps(value), number(value))

    def interval(self, *path: str | int) -> Markup:
        """The interval at a path, `low` to `high`."""
        if self.find(*path) is None:
            return MISSING
        return Markup("{} to {}").format(self(*path, "low"), self(*path, "high"))


_SPAN = Markup('<span class="n" data-field="{}" data-value="{}">{}</span>')
