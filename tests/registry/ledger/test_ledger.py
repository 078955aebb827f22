import copy
import random
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from operator import methodcaller
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from restitch.merging.digests import canonical_json
from restitch.merging.errors import BadInput, Damage, Unavailable
from restitch.registry.ledger.ledger import Act, Ledger, lines
from restitch.registry.ledger.records import Entry, differences, replay, state_of
from restitch.registry.specs.task import TaskSpec
from restitch.registry.store.folder import FolderStore
from restitch.registry.store.objects import ObjectStore
from tests.registry.builders import (
    digest,
    done,
    ledger,
    line_spec,
    merge,
    model,
    model_ref,
    ready,
    record,
    with_task,
)
from tests.registry.store_contract import kill, start, wait_for_line


@pytest.fixture
def line(tmp_path):
    return ledger(tmp_path / "store")


def register(line: Ledger, task: str, name: str = "model") -> Act:
    return done(
        line.act("registered", "tester", "why not", lambda h: with_task(h, task, model(name)))
    )


def test_an_act_is_in_the_state_and_in_the_trail(line):
    act = register(line, "a")
    assert line.state() == act.line_state
    assert act.line_state.entry == act.digest == act.entry.digest
    assert [entry.kind for entry in line.entries()] == ["registered", "configured"]
    assert [e.kind for e in line.entries(newest_first=False)] == ["configured", "registered"]
    assert act.entry.reason == "why not"
    assert act.entry.actor == "tester"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00", act.entry.time)


def test_an_entry_holds_the_values_before_and_after(line):
    register(line, "a")
    merge(line)
    second = merge(line)
    entry = next(line.entries())
    assert second == 2
    assert entry.before == {"/candidate": 2, "/champion": 1}
    assert entry.after == {"/candidate": None, "/champion": 2}
    assert next(e for e in line.entries() if e.kind == "merged").after == {
        "/candidate": 2,
        "/next_version": 3,
        "/versions/2": line.state().versions[2],
    }


def test_replaying_the_trail_gives_the_state(line):
    register(line, "a")
    merge(line)
    line.act("retired", "t", "", lambda h: h.with_state("a", 1, "retired", "not wanted"))
    line.act("configured", "t", "", lambda h: h.with_task(TaskSpec(task="a/b".replace("/", "-"))))
    line_state = line.state()
    assert replay(line.entries(newest_first=False)) == state_of(line_state)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=3)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=8,
)
states = st.dictionaries(st.text(alphabet="ab/~0", max_size=3), json_values, max_size=4)


@settings(max_examples=200)
@given(states, states)
def test_differences_lead_from_any_state_to_any_other(old, new):
    before, after = differences(old, new)
    entry = Entry(
        line="line",
        sequence=1,
        previous=None,
        kind="configured",
        actor="",
        time="",
        before=before,
        after=after,
        reason="",
    )
    assert canonical_json(replay([entry], copy.deepcopy(old))) == canonical_json(new)


def test_a_line_is_created_once(line):
    assert line.create(line_spec(), model_ref("other"), "tester", "again") is None
    assert line.state().base == model_ref("base")
    assert len(list(line.entries())) == 1


def test_an_unknown_line_is_an_error_that_lists_the_lines(line):
    other = Ledger(line.objects, "other")
    assert other.find() is None
    assert not other.exists()
    asked: list[Callable[[], object]] = [
        other.state,
        lambda: register(other, "a"),
        lambda: list(other.entries()),
    ]
    for ask in asked:
        with pytest.raises(BadInput, match="there is no line other") as raised:
            ask()
        assert raised.value.found == "lines line"


def test_lines_are_found_by_their_states(line):
    Ledger(line.objects, "abc").create(line_spec("abc"), model_ref("base"), "t", "")
    assert list(lines(line.objects)) == ["abc", "line"]


def test_a_change_that_finds_nothing_to_do_is_no_act(line):
    line_state = line.state()
    assert line.act("promoted", "tester", "", lambda _head: None) is None
    assert line.state() == line_state
    assert len(list(line.objects.store.list("audit"))) == 1


def test_after_a_lost_race_the_change_runs_on_the_newer_state(line):
    seen = []

    def change(line_state):
        seen.append(line_state.sequence)
        if len(seen) == 1:
            register(line, "first")
        return with_task(line_state, "second", model())

    act = line.act("registered", "tester", "", change)
    assert seen == [1, 2]
    assert set(act.line_state.tasks) == {"first", "second"}
    assert [e.sequence for e in line.entries()] == [3, 2, 1]


def test_an_entry_that_no_state_reaches_does_not_count(line, monkeypatch):
    monkeypatch.setattr(line, "_swap", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        register(line, "a")
    monkeypatch.undo()
    assert len(list(line.objects.store.list("audit"))) == 2, "an orphan is left"
    assert line.state().tasks == {}
    register(line, "a")
    assert [e.sequence for e in line.entries()] == [2, 1]


def test_an_act_that_loses_every_race_gives_up_with_an_error(line, monkeypatch):
    monkeypatch.setattr(line, "_swap", lambda *_: False)
    monkeypatch.setattr("restitch.registry.ledger.ledger._ATTEMPTS", 5)
    with pytest.raises(Unavailable, match="run the same command again"):
        register(line, "a")


def test_objects_are_named_when_the_act_counts(line):
    act = line.act(
        "registered",
        "tester",
        "",
        lambda line_state: with_task(line_state, "a", model()),
        lambda line_state: {"weights": line_state.tasks["a"].versions[1].model.weights},
    )
    assert act.entry.digests == {"weights": model().model.weights}


@pytest.mark.parametrize("seed", range(3))
def test_many_threads_lose_nothing(line, seed):
    chance = random.Random(seed)
    tasks = [f"t{n}" for n in range(30)]
    chance.shuffle(tasks)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda task: register(line, task), tasks))
    line_state = line.state()
    assert set(line_state.tasks) == set(tasks)
    entries = list(line.entries(newest_first=False))
    assert [e.sequence for e in entries] == list(range(1, 32))
    assert [e.time for e in entries] == sorted(e.time for e in entries)
    assert len({e.time for e in entries}) == 31
    assert replay(entries) == state_of(line_state)


def test_many_processes_lose_nothing(line):
    code = f"""
        import sys
        from pathlib import Path
        from tests.registry.builders import *
        line = Ledger(ObjectStore(FolderStore(Path({str(line.objects.store.root)!r}))), "line")
        for number in range(15):
            name = f"t{{sys.argv[1]}}-{{number}}"
            line.act("registered", "t", "", lambda head: with_task(head, name, model(name)))
    """
    processes = [start(code, str(n)) for n in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    line_state = line.state()
    assert len(line_state.tasks) == 60
    assert [e.sequence for e in line.entries()] == list(range(61, 0, -1))
    assert replay(line.entries(newest_first=False)) == state_of(line_state)


def test_a_process_killed_at_any_moment_leaves_a_line_that_goes_on(line):
    code = f"""
        from pathlib import Path
        from tests.registry.builders import *
        line = Ledger(ObjectStore(FolderStore(Path({str(line.objects.store.root)!r}))), "line")
        print("on", flush=True)
        while True:
            merge(line)
    """
    chance = random.Random(2)
    for _ in range(4):
        process = start(code)
        wait_for_line(process)
        time.sleep(chance.uniform(0.05, 0.3))
        kill(process)
        line_state = line.state()
        assert replay(line.entries(newest_first=False)) == state_of(line_state)
        assert [r.version for r in line.history()] == sorted(line_state.versions, reverse=True)
    assert merge(line) == line.state().newest


def test_an_altered_entry_is_damage_that_names_it(line):
    register(line, "a")
    register(line, "b")
    entry = list(line.entries())[1]
    path = line.objects.store.root / "audit" / entry.digest
    path.write_bytes(path.read_bytes().replace(b"why not", b"because"))
    with pytest.raises(Damage, match=entry.digest):
        list(line.entries())


def test_a_removed_entry_is_damage_that_names_it(line):
    register(line, "a")
    register(line, "b")
    entry = list(line.entries())[1]
    (line.objects.store.root / "audit" / entry.digest).unlink()
    with pytest.raises(Damage, match="audit entry 2 is missing"):
        list(line.entries())


def test_an_entry_left_out_of_the_chain_is_damage(line):
    register(line, "a")
    act = register(line, "b")
    first = list(line.entries())[2]
    forged = act.entry.model_copy(update={"previous": first.digest})
    line.objects.store.put(f"audit/{forged.digest}", forged.to_bytes())
    line_state = line.state().model_copy(update={"entry": forged.digest})
    tag = line.objects.store.read_tagged("lines/line/head.json").tag
    line.objects.store.swap("lines/line/head.json", tag, line_state.model_dump_json().encode())
    with pytest.raises(Damage, match="broken at"):
        list(line.entries())


def test_an_unreadable_state_is_damage(line):
    store = line.objects.store
    (store.root / "lines/line/head.json").write_bytes(b'{"format": 99}')
    with pytest.raises(Damage, match=re.escape("lines/line/head.json")):
        line.state()


def test_a_record_of_a_merged_version_is_verified(line):
    version = merge(line)
    assert line.merged(version).version == version
    with pytest.raises(BadInput, match="no version 7"):
        line.merged(7)
    blob = line.state().versions[version]
    (line.objects.store.root / "blobs" / blob).write_bytes(b"{}")
    with pytest.raises(Damage, match=blob):
        line.merged(version)


def test_times_in_the_trail_never_go_back(tmp_path):
    times = iter(datetime(2026, 1, day, tzinfo=UTC) for day in (5, 3, 4, 6))
    line = Ledger(ObjectStore(FolderStore(tmp_path)), "line", now=lambda: next(times))
    line.create(line_spec(), model_ref("base"), "t", "")
    for task in ("a", "b", "c"):
        register(line, task)
    found = [e.time for e in line.entries(newest_first=False)]
    assert found == sorted(found)
    assert found[1] == "2026-01-05T00:00:00.000001+00:00"
    assert found[3] == "2026-01-06T00:00:00.000000+00:00"


def test_the_state_at_a_time_is_the_one_of_then(tmp_path):
    now = [datetime(2026, 3, 1, tzinfo=UTC)]
    line = Ledger(ObjectStore(FolderStore(tmp_path)), "line", now=lambda: now[0])
    line.create(line_spec(), model_ref("base"), "t", "")
    heads = [line.state()]
    for task in ("a", "b", "c"):
        now[0] += timedelta(days=1)
        line.act("localized", "t", "", partial(with_task, task=task, model=ready(task)))
        merge(line)
        heads.append(line.state())
    for day, line_state in enumerate(heads):
        assert line.state_at(datetime(2026, 3, 1 + day, 12, tzinfo=UTC)) == line_state.model_copy(
            update={"generation": line_state.sequence}
        )
    assert line.state_at(datetime(2026, 2, 1, tzinfo=UTC)) is None


def test_the_same_acts_at_the_same_times_give_the_same_bytes(tmp_path):
    trails = []
    for name in ("one", "two"):
        times = (datetime(2026, 1, 1, second=tick, tzinfo=UTC) for tick in range(60))
        line = Ledger(ObjectStore(FolderStore(tmp_path / name)), "line", now=times.__next__)
        line.create(line_spec(), model_ref("base"), "t", "")
        for task in ("a", "b"):
            register(line, task)
        merge(line)
        store = line.objects.store
        trails.append({name: store.read(name) for name in store.list()})
    assert trails[0] == trails[1]


def test_reading_a_thousand_versions_reads_each_object_once(tmp_path, monkeypatch):
    line = ledger(tmp_path)
    store = line.objects.store
    tasks = tuple(f"t{n}" for n in range(20))

    def change(line_state):
        for version in range(1, 1001):
            made = record(version, tasks=tasks)
            line_state = line_state.with_merged(line.objects.put_blob(made.to_bytes()))
        return line_state

    for number in range(1000):
        line.act("configured", "t", "", methodcaller("with_pin", number % 2 == 0))
    line.act("merged", "t", "", change)
    reads: list[str] = []
    read = store.read

    def counted(name: str) -> bytes:
        reads.append(name)
        return read(name)

    monkeypatch.setattr(store, "read", counted)
    monkeypatch.setattr(store, "list", lambda *_: pytest.fail("a read lists the store"))

    def reads_of(look: Callable[[], Any]) -> tuple[Any, int]:
        reads.clear()
        found = look()
        assert len(reads) == len(set(reads))
        return found, len(reads)

    # One more: the line's state.
    assert reads_of(lambda: len(list(line.entries()))) == (1002, 1003)
    assert reads_of(lambda: len(list(line.history()))) == (1000, 1001)
    then, count = reads_of(lambda: line.state_at(datetime.now(UTC)))
    assert then.newest == 1000
    assert count <= 1003
    one, count = reads_of(lambda: line.merged(500))
    assert (one.version, count) == (500, 2)


def test_a_record_is_read_as_it_was_stored(tmp_path):
    line = ledger(tmp_path)
    made = record(gates=[{"gate": "min_retention", "limit": 0.9, "value": 0.8, "passed": False}])
    blob = line.objects.put_blob(made.to_bytes())
    assert blob == made.digest
    act = done(line.act("merged", "t", "", lambda line_state: line_state.with_merged(blob)))
    assert act.line_state.newest == 1
    assert line.merged(1) == made
    assert not made.passed
    assert made.mean_accuracy == 0.6
    assert record(results={}).mean_normalized is None
    assert made.digest != record().digest
    assert digest("x") not in made.to_bytes().decode()


def test_a_replay_leaves_the_entries_as_they_are():
    """Later acts change a value in the state, and not in the act that put it there."""
    first: dict[str, object] = {"after": {"/tasks": {"a": {"state": "new"}}}, "before": {}}
    second: dict[str, object] = {
        "after": {"/tasks/a/state": "ready"},
        "before": {"/tasks/a/state": "new"},
    }
    common = {"line": "line", "previous": None, "kind": "configured", "actor": "", "time": ""}
    entries = [
        Entry.model_validate({"sequence": n, "reason": "", **common, **changes})
        for n, changes in enumerate((first, second), 1)
    ]
    before = [entry.to_bytes() for entry in entries]
    assert replay(entries) == {"tasks": {"a": {"state": "ready"}}}
    assert [entry.to_bytes() for entry in entries] == before
