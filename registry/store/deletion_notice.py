"""The deletion notice of a store, `gc/state.json`: which objects are being removed, and by whom.

One process at a time removes objects, and lists them here first. A process that has just named
an object checks the notice: if the object is listed, it waits for the removal to end and then
checks that the object still exists. The notice of a process that was killed is ignored.
"""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from restitch.merging.errors import Unavailable
from restitch.registry.store.attempts import may_run, this_process
from restitch.registry.store.base import NotInStore, Store

STATE = "gc/state.json"

# A removal on another host that takes longer than this was killed.
_GIVEN_UP_AFTER = timedelta(hours=1)
_WAIT_AT_MOST, _LOOK_EVERY = 60.0, 0.2
_AT_ONCE = 8


@contextmanager
def deletion_notice(store: Store, names: list[str]) -> Iterator[None]:
    """List the objects that the caller removes within the context.

    Raises:
        Unavailable: another process is removing objects.
    """
    state, tag = _state(store)
    if _is_alive(state):
        raise Unavailable(
            "another `restitch gc` or purge is running in this store",
            found=f"process {state['pid']} on {state['host']}",
            hint="wait until it has ended; the notice of a killed process expires after an hour",
        )
    notice = {**this_process(), "names": names}
    notice_tag = store.swap(STATE, tag, json.dumps(notice).encode())
    if notice_tag is None:
        raise Unavailable(
            "another `restitch gc` or purge started at the same moment", hint="run it again"
        )
    try:
        yield
    finally:
        store.swap(STATE, notice_tag, json.dumps({**notice, "names": []}).encode())


def check_not_deleted(store: Store, names: set[str]) -> None:
    """Make sure that objects which the caller has just named exist and stay.

    Raises:
        Unavailable: one of them was removed, or its removal did not end in time.
    """
    state, _ = _state(store)
    if not state:
        return
    deadline = time.monotonic() + _WAIT_AT_MOST
    while _is_alive(state) and names & set(state["names"]):
        if time.monotonic() > deadline:
            raise Unavailable(
                "`restitch gc` or a purge is removing objects that this change refers to",
                found=f"process {state['pid']} on {state['host']}",
                hint="run the same command again when it has ended",
            )
        time.sleep(_LOOK_EVERY)
        state, _ = _state(store)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        ordered = sorted(names)
        exist = pool.map(store.exists, ordered)
        missing = [name for name, exists in zip(ordered, exist, strict=True) if not exists]
    if missing:
        raise Unavailable(
            "`restitch gc` or a purge has removed objects that this change refers to",
            hint="run the same command again: it makes them again",
            details=missing[:10],
        )


def has_notice(store: Store) -> bool:
    """True if objects were ever removed from a store."""
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
    """True if the process of a notice may still remove objects."""
    return bool(state.get("names")) and may_run(state, _GIVEN_UP_AFTER)
