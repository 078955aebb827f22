"""The store through a network in which every fifth call fails: the same promises.

Each test has a proxy of its own in front of the server, with a seed of its own.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from restitch.merging.errors import Unavailable
from restitch.registry.s3 import retries, transfer
from restitch.registry.s3.conditional_writes import probe_conditional_writes
from restitch.registry.s3.store import S3Store
from restitch.registry.store.base import NotInStore
from tests.faulty_proxy import AFTER, BEFORE, Faults, faulty_proxy
from tests.registry.store_contract import StoreContract, start


@pytest.fixture
def prefix(tmp_path):
    return f"faults/{tmp_path.name.replace('[', '-').replace(']', '-')}"


@pytest.fixture
def faults(request, s3_bucket, s3_url, monkeypatch):
    """A failing network between the store and the server."""
    seed = int.from_bytes(hashlib.sha256(request.node.name.encode()).digest()[:4], "big")
    # In this process only; others wait as they would.
    monkeypatch.setattr(retries, "_FIRST_WAIT", 0.002)
    with faulty_proxy(s3_url, Faults(seed)) as faults:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faults.url)
        yield faults


@pytest.fixture
def store(faults, s3_bucket, prefix, tmp_path):
    return S3Store(s3_bucket, prefix, tmp_path / "cache")


@pytest.mark.slow
class TestFaultyNetwork(StoreContract):
    lives_up_to = 1.0

    @pytest.fixture
    def store(self, store):
        return store

    @pytest.fixture
    def opener(self, faults, s3_bucket, prefix, tmp_path):
        module = "__import__('restitch.registry.s3.store').registry.s3.store"
        cache = str(tmp_path / "cache")
        return f"{module}.S3Store({s3_bucket!r}, {prefix!r}, Path({cache!r}))"

    def test_large_files_come_and_go_with_the_same_bytes(
        self, store, faults, tmp_path, monkeypatch, opener
    ):
        monkeypatch.setattr(transfer, "PART", 5 << 20)
        file = tmp_path / "large"
        for number in range(2):
            file.write_bytes(os.urandom(22 << 20))
            assert store.put(f"large/{number}", file)
            assert store.local_path(f"large/{number}").read_bytes() == file.read_bytes()
            assert not store.put(f"large/{number}", file)
        assert sum(faults.injected.values()) >= 3
        store.sweep(-1)
        assert list(store._uploads()) == []

    def test_every_object_is_as_it_was_written(self, store, faults):
        contents = {f"o/{number}": os.urandom(number * 100) for number in range(50)}
        assert all(store.put(name, data) for name, data in contents.items())
        assert {name: store.read(name) for name in store.list()} == contents
        paths = {name: store.local_path(name) for name in contents}
        assert {name: path.read_bytes() for name, path in paths.items()} == contents
        assert sum(faults.injected.values()) >= 10

    def test_each_swap_is_done_once_and_reported_truly(self, store, opener, faults):
        # Each writer appends its own marks, and prints those whose swap returned a tag.
        code = f"""
            import sys
            from restitch.registry.store.base import NotInStore
            from pathlib import Path
            store, me = {opener}, sys.argv[1]
            for turn in range(8):
                while True:
                    try:
                        data, tag = store.read_tagged("log")
                    except NotInStore:
                        data, tag = b"", None
                    if store.swap("log", tag, data + f"{{me}}{{turn}} ".encode()):
                        print(f"{{me}}{{turn}}")
                        break
        """
        writers = [start(code, name) for name in "abc"]
        reported = [writer.communicate()[0].split() for writer in writers]
        assert [writer.returncode for writer in writers] == [0, 0, 0]
        log = store.read("log").decode().split()
        assert sorted(log) == sorted(mark for some in reported for mark in some)
        assert len(log) == 24

    def test_supported_conditional_writes_are_detected(self, store, faults, s3_bucket, prefix):
        assert all(
            probe_conditional_writes(s3_bucket, f"{prefix}/{number}") for number in range(10)
        )


def test_a_dead_network_is_an_error(faults, store, monkeypatch) -> None:
    monkeypatch.setattr(retries, "pause", lambda _: None)
    store.put("name", b"content")
    faults.share = 1.0
    for kinds in (("error",), ("busy",), ("reset",), ("lost answer",), ("error after",)):
        faults.kinds = kinds
        with pytest.raises(Unavailable):
            store.read("name")
        with pytest.raises(Unavailable):
            store.swap("head", None, b"content")
    faults.share = 0.0
    assert store.read("name") == b"content"
    assert store.swap("head", None, b"again") is None, "lost, and it took effect"
    with pytest.raises(NotInStore):
        store.read("other")


@pytest.mark.parametrize("kind", [*BEFORE, *AFTER])
def test_each_kind_of_fault_is_survived(store, faults, tmp_path, monkeypatch, kind) -> None:
    monkeypatch.setattr(transfer, "PART", 5 << 20)
    monkeypatch.setattr(retries, "ATTEMPTS_ALTERED", 8)  # here every fault may be of this kind
    faults.kinds, faults.share = (kind,), 0.3
    file = tmp_path / "file"
    file.write_bytes(os.urandom(11 << 20))
    tag = None
    for number in range(6):
        data = os.urandom(100)
        assert store.put(f"o/{number}", data)
        assert store.read(f"o/{number}") == data
        tag = store.swap("head", tag, data)
        assert store.read_tagged("head") == (data, tag)
    assert store.put("large", file)
    assert store.local_path("large").read_bytes() == file.read_bytes()
    assert len(list(store.list())) == 8
    assert faults.injected[kind] > 0


@pytest.mark.slow
def test_a_long_run_loses_nothing_and_alters_nothing(
    store, faults, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(transfer, "PART", 5 << 20)
    contents = {f"o/{number}": os.urandom(number * 7) for number in range(3000)}
    files = {f"large/{number}": tmp_path / f"file-{number}" for number in range(20)}
    for file in files.values():
        file.write_bytes(os.urandom(23 << 20))
    marks = [f"{number:04d} ".encode() for number in range(400)]

    def append(mark: bytes) -> None:
        done = None
        while done is None:
            try:
                data, tag = store.read_tagged("log")
            except NotInStore:
                data, tag = b"", None
            done = store.swap("log", tag, data + mark)

    with ThreadPoolExecutor(4) as pool:
        created = list(pool.map(lambda name: store.put(name, contents[name]), contents))
        created += pool.map(lambda name: store.put(name, files[name]), files)
        list(pool.map(append, marks))
        found = dict(zip(contents, pool.map(store.read, contents), strict=True))
        copies = list(pool.map(store.local_path, files))
    assert all(created)
    assert found == contents
    assert set(store.list()) == {*contents, *files, "log"}
    for file, copy in zip(files.values(), copies, strict=True):
        assert copy.read_bytes() == file.read_bytes()
    log = store.read("log")
    assert sorted(log.split()) == [mark.strip() for mark in marks]
    with capsys.disabled():
        print(f"\n{faults.calls} calls, {sum(faults.injected.values())} faults:")
        for kind, count in faults.injected.most_common():
            print(f"  {kind}: {count}")
