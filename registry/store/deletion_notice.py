"""The announcement of what is being removed from a store (`gc/state.json`), for all to see.

One process at a time removes, and says beforehand what. Whoever is about to rely on an object
looks here after it has said so: one that is deletion_notice is waited for, and then is there or not.
A process that was killed removes nothing any more, whatever it deletion_notice.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from restitch.merging.errors import Unavailable
from restitch.registry.store.attempts import process_began
from restitch.registry.store.base import NotInStore, Store

STATE = "gc/state.json"

# A removal on another host that has not ended by then was killed.
_GIVEN_UP_AFTER = timedelta(hours=1)
_WAIT_AT_MOST, _LOOK_EVERY = 60.0, 0.2
_AT_ONCE = 8


@contextmanager
def deletion_notice(store: Store, names: list[str]) -> Iterator[None]:
    """Announce what will be removed for the length of the context, if nobody else removes.

    Raises:
        Unavailable: somebody does.
    """
    state, tag = _state(store)
    if _is_alive(state):
        raise Unavailable(
            "another `restitch gc` is at work in this store",
            found=f"process {state['pid']} on {state['host']}",
            hint="wait until it has ended; one that was killed is given up after an hour",
        )
    mine = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_began": process_began(os.getpid()),
        "time": datetime.now(UTC).isoformat(),
        "names": names,
    }
    mine_tag = store.swap(STATE, tag, json.dumps(mine).encode())
    if mine_tag is None:
        raise Unavailable("another `restitch gc` began at the same moment", hint="run it again")
    try:
        yield
    finally:
        store.swap(STATE, mine_tag, json.dumps({**mine, "names": []}).encode())


def check_not_deleted(store: Store, wanted: set[str]) -> None:
    """Make sure that objects are there, and stay, which something names since a moment ago.

    Raises:
        Unavailable: one was removed meanwhile, or is being removed all the time.
    """
    state, _ = _state(store)
    if not state:
        return
    deadline = time.monotonic() + _WAIT_AT_MOST
    while _is_alive(state) and wanted & set(state["names"]):
        if time.monotonic() > deadline:
            raise Unavailable(
                "what this act names is being removed by `restitch gc`",
                found=f"process {state['pid']} on {state['host']}",
                hint="run the same command again when that has ended",
            )
        time.sleep(_LOOK_EVERY)
        state, _ = _state(store)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        names = sorted(wanted)
        there = pool.map(store.exists, names)
        gone = [name for name, is_there in zip(names, there, strict=True) if not is_there]
    if gone:
        raise Unavailable(
            "what this act names was removed by `restitch gc` while it was made",
            hint="run the same command again: it is made anew",
            details=gone[:10],
        )


def has_notice(store: Store) -> bool:
    """Whether anything was ever deletion_notice in a store."""
    return bool(_state(store)[0])


def _state(store: Store) -> tuple[dict[str, Any], str | None]:
    try:
        data, tag = store.read_tagged(STATE)
    except NotInStore:
        return {}, None
    try:
        return dict(json.loads(data)), tag
    except (ValueError, TypeError):
        return {}, tag


def _is_alive(state: dict[str, Any]) -> bool:
    """Whether a removal may still be at work."""
    if not state.get("names"):
        return False
    if state["host"] == socket.gethostname():
        return bool(process_began(int(state["pid"])) == state["process_began"])
    return datetime.now(UTC) - datetime.fromisoformat(state["time"]) < _GIVEN_UP_AFTER
