"""Ids of models and data sets on the hub: `owner/name[:config][@revision]`, pinned by a commit."""

import re

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?(@[\w./-]+)?\Z", re.ASCII)
_PIN = re.compile(r"@[0-9a-f]{40}\Z")


def keep_pin(new: str, old: str) -> str:
    """Return the old source if the new one is the same without the pinned commit."""
    return old if _PIN.sub("", old) == new else new


def split_pin(source: str) -> tuple[str, str | None]:
    """Split a hub id into the id and its revision; a path is never split."""
    if source.startswith("/"):
        return source, None
    name, _, revision = source.partition("@")
    return name, revision or None


def is_hub_id(source: str) -> bool:
    """True if the source has the form of a hub id."""
    return _HUB_ID.match(source) is not None and not source.startswith((".", "/"))
