"""The contract of every store: a test class inherits `StoreContract` and makes stores.

Writers in other processes open the same store by `opener`, a Python expression.
"""

import random
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from restitch.merging.digests import digest_bytes
from restitch.merging.errors import BadInput
from restitch.registry.store.base import NotInStore, Store
from tests.hub_server import ROOT


class StoreContract:
    """The claims; `store` and `opener` are the inheriting class's fixtures.

    Attributes:
        lives_up_to: the seconds within which a writer is killed that has begun.
    """

    lives_up_to = 0.15

    @pytest.fixture
    def store(self, tmp_path) -> Store:
        raise NotImplementedError

    @pytest.fixture
    def opener(self, tmp_path) -> str:
        """An expression that opens the same store in another process."""
        raise NotImplementedError

    def test_a_stored_object_is_read_and_listed(self, store):
        assert store.put("blobs/a", b"content")
        assert store.read("blobs/a") == b"content"
        assert store.local_path("blobs/a").read_bytes() == b"content"
        assert store.read_tagged("blobs/a").data == b"content"

    def test_an_empty_object_is_an_object(self, store):
        assert store.put("empty", b"")
        assert store.read("empty") == b""
        assert not store.put("empty", b"full")

    def test_a_second_writer_changes_nothing(self, store, tmp_path):
        other = tmp_path / "other"
        other.write_bytes(b"other")
        assert store.put("name", b"first")
        assert not store.put("name", b"second")
        assert not store.put("name", other)
        assert store.read("name") == b"first"
        assert other.exists()

    def test_a_file_is_copied_and_stays(self, store, tmp_path):
        file = tmp_path / "file"
        file.write_bytes(b"x" * 100_000)
        assert store.put("name", file)
        file.write_bytes(b"changed")
        assert store.read("name") == b"x" * 100_000

    def test_a_moved_file_is_gone(self, store, tmp_path):
        file = tmp_path / "file"
        file.write_bytes(b"content")
        assert store.put("name", file, move=True)
        assert not file.exists()
        assert store.read("name") == b"content"
        file.write_bytes(b"again")
        assert not store.put("name", file, move=True)
        assert not file.exists()
        assert store.read("name") == b"content"

    def test_a_missing_object_is_not_in_the_store(self, store):
        for look in (store.read, store.read_tagged, store.local_path):
            with pytest.raises(NotInStore, match="a/b"):
                look("a/b")

    def test_a_folder_of_names_is_no_object(self, store):
        store.put("a/b", b"")
        for look in (store.read, store.local_path):
            with pytest.raises(NotInStore):
                look("a")

    def test_names_are_listed_in_order_below_whole_parts(self, store):
        for name in ("b/2", "b/10", "a", "b-c/1", "b/c/1"):
            store.put(name, b"")
        assert list(store.list()) == ["a", "b-c/1", "b/10", "b/2", "b/c/1"]
        assert list(store.list("b")) == ["b/10", "b/2", "b/c/1"]
        assert list(store.list("b/c")) == ["b/c/1"]
        assert list(store.list("nothing")) == []

    @pytest.mark.parametrize(
        "name",
        [
            "",
            "/",
            "/a",
            "a/",
            "a//b",
            ".",
            "..",
            "a/../b",
            "../a",
            "a/.",
            ".hidden",
            "a/.tmp",
            "a b",
            "a\nb",
            "a\n",
            "a\0b",
            "ä",
            "a\\b",
            "a" * 201,
            "a/" * 600 + "a",
        ],
    )
    def test_a_name_that_could_leave_its_prefix_is_refused(self, store, name):
        calls: list[Callable[[], object]] = [
            lambda: store.put(name, b""),
            lambda: store.read(name),
            lambda: store.read_tagged(name),
            lambda: store.local_path(name),
            lambda: store.swap(name, None, b""),
            lambda: store.mend(name, b""),
            lambda: store.remove(name),
            lambda: store.exists(name),
            lambda: store.digest(name),
        ]
        for call in calls:
            with pytest.raises(BadInput):
                call()

    def test_a_swap_needs_the_present_tag(self, store):
        first = store.swap("head", None, b"1")
        assert first is not None
        assert store.read_tagged("head").tag == first
        assert store.swap("head", None, b"x") is None
        assert store.swap("head", "0" * 64, b"x") is None
        second = store.swap("head", first, b"2")
        assert second is not None
        assert store.swap("head", first, b"x") is None
        assert store.read_tagged("head") == (b"2", second)

    def test_a_swap_without_a_tag_creates_the_object(self, store):
        assert store.swap("head", "0" * 64, b"x") is None
        with pytest.raises(NotInStore):
            store.read("head")

    def test_details_list_sizes_and_times(self, store):
        store.put("b/2", b"12345")
        store.put("a", b"")
        found = list(store.details())
        assert [(each.name, each.size) for each in found] == [("a", 0), ("b/2", 5)]
        assert all(abs(each.modified - time.time()) < 600 for each in found)
        assert [each.name for each in store.details("b")] == ["b/2"]
        assert list(store.details("nothing")) == []

    def test_a_removed_object_can_be_put_again(self, store):
        store.put("a/b", b"first")
        assert store.exists("a/b")
        assert store.remove("a/b")
        assert not store.exists("a/b")
        assert not store.remove("a/b")
        assert list(store.list()) == []
        assert store.put("a/b", b"second")
        assert store.read("a/b") == b"second"

    def test_a_mended_object_has_the_new_content(self, store, tmp_path):
        file = tmp_path / "file"
        file.write_bytes(b"right")
        store.put("a", b"wrong")
        store.mend("a", file)
        store.mend("gone", b"right")
        for name in ("a", "gone"):
            assert store.read(name) == b"right"
            assert store.digest(name) == digest_bytes(b"right")
        assert file.exists()

    def test_the_digest_is_of_what_the_store_holds(self, store):
        store.put("a", b"x" * 100_000)
        store.local_path("a")
        assert store.digest("a") == digest_bytes(b"x" * 100_000)
        store.mend("a", b"y")
        assert store.digest("a") == digest_bytes(b"y")
        with pytest.raises(NotInStore):
            store.digest("b")

    def test_one_of_many_threads_creates_an_object(self, store):
        with ThreadPoolExecutor(16) as pool:
            for number in range(10):
                name = f"race/{number}"
                contents = [f"{writer}".encode() * 1000 for writer in range(16)]
                created = list(pool.map(partial(store.put, name), contents))
                assert created.count(True) == 1
                assert store.read(name) == contents[created.index(True)]

    def test_each_swap_of_many_threads_counts_once(self, store):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: count_up(store), range(40)))
        assert store.read("count") == b"40"

    def test_each_swap_of_many_processes_counts_once(self, store, opener):
        code = f"""
            from pathlib import Path
            from restitch.registry.store.folder import FolderStore
            from tests.registry.store_contract import count_up
            store = {opener}
            for _ in range(10):
                count_up(store)
        """
        processes = [start(code) for _ in range(4)]
        assert [process.wait() for process in processes] == [0] * 4
        assert store.read("count") == b"40"

    def test_one_of_many_processes_creates_each_object(self, store, opener):
        code = f"""
            import sys
            from pathlib import Path
            from restitch.registry.store.folder import FolderStore
            store = {opener}
            made = [n for n in range(20) if store.put(f"o/{{n}}", sys.argv[1].encode() * 5000)]
            print(*made)
        """
        processes = [start(code, str(writer)) for writer in range(4)]
        made = [set(process.communicate()[0].split()) for process in processes]
        assert sum(len(some) for some in made) == 20
        for writer, some in enumerate(made):
            for number in some:
                assert store.read(f"o/{number}") == str(writer).encode() * 5000

    def test_a_writer_killed_at_any_moment_leaves_whole_objects_or_none(
        self, store, opener, tmp_path
    ):
        file = tmp_path / "large"
        file.write_bytes(bytes(range(256)) * 40_000)
        code = f"""
            import sys
            from pathlib import Path
            from restitch.registry.store.folder import FolderStore
            store = {opener}
            tag = None
            store.put(f"begun/{{sys.argv[1]}}", b"")
            print("on", flush=True)
            for number in range(100000):
                store.put(f"killed/{{sys.argv[1]}}-{{number}}", Path({str(file)!r}))
                tag = store.swap(f"head-{{sys.argv[1]}}", tag, str(number).encode() * 50000)
        """
        chance = random.Random(1)
        for attempt in range(6):
            process = start(code, str(attempt))
            wait_for_line(process)
            time.sleep(chance.uniform(0.0, self.lives_up_to))
            kill(process)
        whole = file.read_bytes()
        names = list(store.list("killed"))
        assert names, "the writers were killed too early"
        assert all(store.read(name) == whole for name in names)
        for attempt in range(6):
            try:
                data = store.read(f"head-{attempt}")
            except NotInStore:
                continue
            number = data[: len(data) // 50_000]
            assert data == number * 50_000
        # What died in between is in nobody's way.
        assert store.put("killed/after", file)
        store.sweep(0)
        assert sum(1 for _ in store.list("killed")) == len(names) + 1


def count_up(store: Store) -> None:
    """Add one to the number that an object holds, again after each lost swap."""
    done = None
    while done is None:
        try:
            data, tag = store.read_tagged("count")
        except NotInStore:
            data, tag = b"0", None
        done = store.swap("count", tag, str(int(data) + 1).encode())


def wait_for_line(process: subprocess.Popen[str]) -> None:
    """Go on when the process has printed something."""
    assert process.stdout is not None
    process.stdout.readline()


def kill(process: subprocess.Popen[str]) -> None:
    """End a process without a chance to clean up."""
    process.kill()
    process.communicate()


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Another process that runs this code."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        cwd=Path(ROOT),
        stdout=subprocess.PIPE,
        text=True,
    )
