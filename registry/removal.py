"""Removing objects while others work, so that no act ever counts whose objects are gone.

Whoever removes announces what (`gc/state.json`), then swaps every head once, then looks again
at what is referred to. An act that had looked at its head before that loses its swap and
looks again; one that looks later finds the announcement, waits, and compares what it is about
to name with what is there. So either the removal sees the reference, or the act sees the
removal: neither needs the other to be quick. Where nothing was ever removed, an act costs one
look more.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from merging.errors import Damage, Unavailable
from registry.attempts import process_began
from registry.head import Head
from registry.history import MergedRecord
from registry.objects import ObjectStore, parsed
from registry.references import Reference, of_head, of_manifest, of_record
from registry.store import NotInStore, Store

STATE = "gc/state.json"

# A removal on another host that has not ended by then was killed.
_GIVEN_UP_AFTER = timedelta(hours=1)
_WAIT_AT_MOST, _LOOK_EVERY = 60.0, 0.2
_AT_ONCE = 8


@contextmanager
def announced(store: Store, names: list[str]) -> Iterator[None]:
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


def check_kept(objects: ObjectStore, old: Head | None, new: Head) -> None:
    """Make sure that what a head would name and the one before did not is there, and stays.

    Raises:
        Unavailable: something was removed meanwhile, or is being removed all the time.
    """
    state, _ = _state(objects.store)
    if not state:
        return
    before = {each.digest for each in of_head(old)} if old is not None else set()
    added = [each for each in of_head(new) if each.digest not in before]
    check_there(objects.store, {f"blobs/{each}" for each in _whole(objects, added) - before})


def check_there(store: Store, wanted: set[str]) -> None:
    """Make sure that objects are there, and stay, which something names since a moment ago.

    Raises:
        Unavailable: one was removed meanwhile, or is being removed all the time.
    """
    state, _ = _state(store)
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


def _whole(objects: ObjectStore, added: list[Reference]) -> set[str]:
    """The digests of references, and of what records and lists of files name in turn."""
    digests = set()
    for each in added:
        digests.add(each.digest)
        with suppress(Damage, ValueError):  # what is gone is found to be so anyway
            if each.role == "record":
                data = objects.read_blob(each.digest)
                digests |= {r.digest for r in of_record(parsed(MergedRecord, data, each.digest))}
            elif each.role == "manifest":
                data = objects.read_blob(each.digest)
                digests |= {r.digest for r in of_manifest(data, each)}
    return digests


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
