"""Processes share the pieces of one work; a dead one costs the piece that it was at."""

import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from restitch.merging.digests import digest_json
from restitch.merging.errors import BadInput, Unavailable
from restitch.registry.store.attempts import this_process
from restitch.registry.store.base import Store
from restitch.tasks.runtime import sharing as shared
from restitch.tasks.runtime.sharing import Offer, Work, offers, part_size, sharing, take_part
from restitch.tasks.runtime.workspace import Workspace, workspace
from tests.fake_prefect import FakePrefect, fake_prefect

CALLED = "POST /deployments/the-assist/create_flow_run"


class Squares:
    """The squares of some numbers, as pieces of work."""

    def __init__(self, space: Workspace, count: int) -> None:
        self.space, self.done = space, list[int]()
        keys = tuple(digest_json(["square", number]) for number in range(count))
        self.work = Work("demo", "squares", {"count": count}, "square", keys)

    def do(self, number: int) -> None:
        self.done.append(number)
        blob = self.space.objects.put_json(number**2)
        self.space.objects.publish(self.work.results, self.work.keys[number], blob)


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setenv("RESTITCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(shared, "POLL_SECONDS", 0.01)
    return workspace()


@pytest.fixture
def server(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakePrefect]:
    with fake_prefect() as found:
        monkeypatch.setenv("PREFECT_API_URL", found.url)
        found.knows_deployments()
        yield found


def dead_process() -> dict[str, Any]:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return {**this_process(), "pid": ended.pid, "process_began": 1.0}


def put(store: Store, name: str, process: dict[str, Any]) -> None:
    tagged = None
    with suppress(LookupError):
        tagged = store.read_tagged(name).tag
    assert store.swap(name, tagged, json.dumps(process).encode()) is not None


def test_short_work_is_done_here_and_leaves_nothing(space: Workspace, server: FakePrefect) -> None:
    pieces = Squares(space, 5)
    with sharing(space, pieces.work) as turns:
        for number in turns:
            pieces.do(number)
    assert pieces.done == [0, 1, 2, 3, 4]
    assert not list(space.objects.store.list("offers"))
    assert not server.requests


@pytest.mark.parametrize("alone", ["by the setting", "by the caller"])
def test_work_that_is_to_be_done_alone_is_never_offered(
    space: Workspace, server: FakePrefect, monkeypatch: pytest.MonkeyPatch, alone: str
) -> None:
    monkeypatch.setenv("RESTITCH_SHARE_AFTER", "inf" if alone == "by the setting" else "0")
    monkeypatch.setattr(threading, "excepthook", lambda found: pytest.fail(str(found)))
    pieces = Squares(space, 3)
    after = None if alone == "by the setting" else math.inf
    with sharing(space, pieces.work, after=after) as turns:
        for number in turns:
            pieces.do(number)
            time.sleep(0.02)
    assert pieces.done == [0, 1, 2]
    assert not server.requests
    assert not any(isinstance(each, threading.Timer) for each in threading.enumerate())


def test_long_work_is_offered_and_each_piece_is_done_once(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESTITCH_SHARE_AFTER", "0")
    mine, theirs = Squares(space, 20), Squares(space, 20)
    seen: list[int] = []

    def help_once_it_is_offered() -> None:
        while mine.work.identity not in offers(space.objects.store):
            pass
        offer = Offer(space.objects.store, mine.work.identity)
        assert offer.work() == mine.work
        take_part(space, offer, theirs)

    helper = threading.Thread(target=help_once_it_is_offered)
    helper.start()
    with sharing(space, mine.work) as turns:
        for number in turns:
            seen.append(number)
            if not shared.is_done(space, mine.work, number):
                mine.do(number)
            if number == 0:
                while not theirs.done:  # it is long work
                    time.sleep(0.001)
    helper.join()
    assert sorted(seen) == list(range(20))
    assert sorted(mine.done + theirs.done) == list(range(20))
    assert theirs.done
    assert not list(space.objects.store.list("offers"))


def test_pieces_of_an_earlier_run_are_not_done_again(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESTITCH_SHARE_AFTER", "0")
    pieces = Squares(space, 4)
    for number in (1, 2):
        pieces.do(number)
    offer = Offer(space.objects.store, pieces.work.identity)
    offer.make(pieces.work)
    take_part(space, offer, pieces)
    assert pieces.done == [1, 2, 0, 3]


@pytest.mark.parametrize("host", ["here", "there"])
def test_the_piece_of_a_dead_process_is_taken_over(
    space: Workspace, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    store, pieces = space.objects.store, Squares(space, 2)
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    dead = dead_process() if host == "here" else {**this_process(), "host": "another"}
    put(store, f"offers/{pieces.work.identity}/0.json", dead)
    offer = Offer(store, pieces.work.identity)
    if host == "there":
        assert not offer.claim(0)
        clock[0] += shared.LOST_AFTER - 1
        assert not offer.claim(0)
        put(store, f"offers/{pieces.work.identity}/0.json", {**dead, "renewed": 1.0})
        clock[0] += 2
        assert not offer.claim(0)
        clock[0] += shared.LOST_AFTER
    assert offer.claim(0)
    assert not Offer(store, pieces.work.identity).claim(0)


def test_claims_are_renewed_while_their_process_lives(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "RENEW_SECONDS", 0.01)
    store, pieces = space.objects.store, Squares(space, 2)
    offer = Offer(store, pieces.work.identity)
    offer.open()
    offer.make(pieces.work)
    assert offer.claim(1)
    names = sorted(store.list("offers"))
    assert len(names) == 2
    before = [store.read_tagged(name).tag for name in names]
    while any(store.read_tagged(n).tag == b for n, b in zip(names, before, strict=True)):
        pass
    offer.withdraw()
    offer.close()
    assert not list(store.list("offers"))


def test_the_offer_of_a_dead_process_is_none(space: Workspace) -> None:
    store, pieces = space.objects.store, Squares(space, 2)
    offer = Offer(store, pieces.work.identity)
    offer.make(pieces.work)
    name = f"offers/{pieces.work.identity}/work.json"
    put(store, name, {**json.loads(store.read(name)), **dead_process()})
    assert Offer(store, pieces.work.identity).work() is None
    assert take_part(space, Offer(store, pieces.work.identity), pieces) == ()


def test_a_helper_that_fails_leaves_the_piece_to_others(space: Workspace) -> None:
    pieces = Squares(space, 2)
    offer = Offer(space.objects.store, pieces.work.identity)
    offer.make(pieces.work)

    def fail(number: int) -> None:
        raise Unavailable("no memory")

    pieces.do = fail  # type: ignore[method-assign]
    with pytest.raises(Unavailable, match="no memory"):
        take_part(space, offer, pieces)
    assert Offer(space.objects.store, pieces.work.identity).claim(0)


def test_work_that_fails_is_withdrawn(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESTITCH_SHARE_AFTER", "0")
    work, store = Squares(space, 3).work, space.objects.store

    def fail() -> None:
        with sharing(space, work) as turns:
            for _ in turns:
                while not offers(store):
                    time.sleep(0.001)
                raise Unavailable("the disk is full")

    with pytest.raises(Unavailable, match="the disk is full"):
        fail()
    assert not list(store.list("offers"))


WORKERS = [{"name": name, "status": status} for name, status in (
    ("a", "ONLINE"), ("b", "ONLINE"), ("c", "OFFLINE"), ("d", "ONLINE"),
)]  # fmt: skip


@pytest.mark.parametrize(
    ("pool", "asked"),
    [
        ({"name": "gpu", "type": "process", "concurrency_limit": None}, 3),
        ({"name": "gpu", "type": "kubernetes", "concurrency_limit": None}, 4),
        ({"name": "gpu", "type": "kubernetes", "concurrency_limit": 2}, 2),
    ],
)
def test_as_many_workers_are_asked_as_can_help(
    space: Workspace,
    server: FakePrefect,
    monkeypatch: pytest.MonkeyPatch,
    pool: dict[str, Any],
    asked: int,
) -> None:
    monkeypatch.setenv("RESTITCH_SHARE_AFTER", "0")
    server.answers["GET /work_pools/gpu"] = (200, pool)
    server.answers["POST /work_pools/gpu/workers/filter"] = (200, WORKERS)
    server.answers["GET /flow_runs/new"] = (200, {"id": "new", "state_type": "SCHEDULED"})
    server.answers["POST /flow_runs/new/set_state"] = (201, {})
    pieces = Squares(space, 5)
    with sharing(space, pieces.work) as turns:
        for number in turns:
            while len(server.bodies(CALLED)) < asked:
                time.sleep(0.001)
            pieces.do(number)
    parameters = {"line": "demo", "offer": pieces.work.identity}
    bodies = server.bodies(CALLED)
    assert [body["parameters"] for body in bodies] == [parameters] * asked
    assert len({body["idempotency_key"] for body in bodies}) == asked
    # No worker has begun them.
    states = server.bodies("POST /flow_runs/new/set_state")
    assert [body["state"]["type"] for body in states] == ["CANCELLED"] * asked


def test_without_a_deployment_of_helpers_the_work_is_done_here(
    space: Workspace, server: FakePrefect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESTITCH_SHARE_AFTER", "0")
    del server.answers["GET /deployments/name/assist/restitch"]
    pieces = Squares(space, 3)
    with sharing(space, pieces.work) as turns:
        for number in turns:
            while not server.requests:
                time.sleep(0.001)
            pieces.do(number)
    assert pieces.done == [0, 1, 2]
    assert not server.bodies(CALLED)


def test_a_server_that_is_away_is_a_warning(
    space: Workspace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RESTITCH_SHARE_AFTER", "0")

    def away(*_: object) -> tuple[str, ...]:
        raise Unavailable("the Prefect server cannot be used")

    monkeypatch.setattr(shared, "call_helpers", away)
    pieces = Squares(space, 3)
    with sharing(space, pieces.work) as turns:
        for number in turns:
            while "no worker is asked to help" not in caplog.text:
                time.sleep(0.001)
            pieces.do(number)
    assert pieces.done == [0, 1, 2]


@pytest.mark.parametrize("value", ["soon", "-1", "nan"])
def test_the_settings_are_checked(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("RESTITCH_SHARE_AFTER", value)
    with pytest.raises(BadInput, match="RESTITCH_SHARE_AFTER"):
        shared.share_after()
    monkeypatch.setenv("RESTITCH_PART_SIZE", value)
    with pytest.raises(BadInput, match="RESTITCH_PART_SIZE"):
        part_size()
