"""Settings in words, for the trail and for the terminal."""

from typing import Any


def changed(key: str, old: Any, new: Any) -> list[str]:
    """A changed setting as `key: old -> new`, one line for each value in a group of settings."""
    if isinstance(old, dict) or isinstance(new, dict):
        before, after = (value if isinstance(value, dict) else {} for value in (old, new))
        return [
            line
            for name in sorted(before.keys() | after.keys())
            if before.get(name) != after.get(name)
            for line in changed(f"{key}.{name}", before.get(name), after.get(name))
        ]
    return [f"{key}: {setting(old)} -> {setting(new)}"]


def setting(value: Any) -> str:
    """A setting, or a group of them as `name=value`."""
    if isinstance(value, dict):
        return " ".join(f"{name}={setting(one)}" for name, one in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(setting, value)) or "none"
    return "none" if value is None else str(value)
