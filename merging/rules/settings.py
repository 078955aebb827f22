"""Checks of the settings of merge methods, and the values that tuning tries."""

from collections.abc import Iterable

from restitch.merging.errors import BadInput

# The coefficients that the papers try when they tune one.
COEFFICIENTS = tuple(n / 10 for n in range(1, 11))
# For methods whose best coefficient lies above 1: each member's part of the change is reduced.
LARGE_COEFFICIENTS = (*(n / 5 for n in range(1, 11)), 2.4, 2.8, 3.4, 4.0)


def bad_setting(name: str, problem: str, expected: str, found: object) -> BadInput:
    """The error for a setting that cannot be used; `problem` completes "the setting NAME is"."""
    return BadInput(
        f"the setting {name} is {problem}",
        expected=expected,
        found=found,
        hint=f"correct method: settings: {name}",
    )


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise `BadInput` if the value of a setting is not one of the choices."""
    if value not in choices:
        raise bad_setting(name, "unknown", " or ".join(choices), value)


def check_range(name: str, value: float, low: float, high: float) -> float:
    """The value of a setting; raises `BadInput` if it is not in the range from `low` to `high`."""
    if not low <= value <= high:
        raise bad_setting(name, "out of range", f"a number from {low} to {high}", value)
    return value
