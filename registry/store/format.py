"""The format of a store: a number in `format.json`, which is written before the first line.

`Home.open_store` calls `check_format`, so every command refuses a store of another format.
"""

import json

from restitch.merging.digests import canonical_json
from restitch.merging.errors import BadInput
from restitch.registry.store.base import NotInStore, Store

FORMAT = 2
MARKER = "format.json"


def check_format(store: Store) -> None:
    """Refuse a store that this version of restitch cannot read; an empty store passes.

    Raises:
        BadInput: the store has another format, or it has lines and no format number.
    """
    found = _read(store)
    if found is None and any(store.list("lines")):
        # Another process may have made the store since: it writes the marker first.
        found = _read(store) or "no format number"
    if found not in (None, str(FORMAT)):
        raise BadInput(
            f"the store {store.address} has another format than this version of restitch reads",
            expected=f"format {FORMAT}",
            found=found,
            hint="use the version of restitch that made this store, or set RESTITCH_STORE to "
            "another folder or s3://bucket/prefix",
        )


def mark_format(store: Store) -> None:
    """Write the format number into a new store; raises like `check_format`."""
    if not store.put(MARKER, canonical_json({"format": FORMAT})):
        check_format(store)


def _read(store: Store) -> str | None:
    try:
        return str(json.loads(store.read(MARKER))["format"])
    except NotInStore:
        return None
    except (ValueError, KeyError, TypeError):
        return f"an unreadable {MARKER}"
