"""Local copies: never too many, never one that is in use, never half of one."""

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from restitch.merging.errors import BadInput
from restitch.registry.s3.settings import cache_limit
from restitch.registry.store.read_cache import ReadCache
from tests.registry.store_contract import start, wait_for_line

SIZE = 1000


@pytest.fixture
def cache(tmp_path):
    return ReadCache(tmp_path / "cache", lambda: 3 * SIZE)


def writes(number: int):
    def fetch(file: Path) -> None:
        file.write_bytes(bytes([number]) * SIZE)

    return fetch


def refuse(_: Path) -> None:
    raise AssertionError("it is here already")


def copies(cache: ReadCache) -> list[str]:
    return sorted(name for _, name, _ in cache._copies())


def elsewhere(cache: ReadCache, *names: str, stays: bool = False):
    """Get copies in another process, which ends or goes on having them."""
    process = start(
        f"""
        import sys
        from pathlib import Path
        from restitch.registry.store.read_cache import ReadCache
        cache = ReadCache(Path({str(cache.root)!r}), lambda: {3 * SIZE})
        for name in {names!r}:
            cache.get(name, lambda file: file.write_bytes(name[-1].encode() * {SIZE}))
        print("has them", flush=True)
        if {stays}:
            sys.stdin.read()
        """
    )
    wait_for_line(process)
    if not stays:
        process.communicate()
    return process


def test_the_least_recently_used_copy_is_removed_first(cache) -> None:
    elsewhere(cache, "b/1", "b/2", "b/3")
    elsewhere(cache, "b/1")  # used again: now 2 is the oldest
    elsewhere(cache, "b/4")
    assert copies(cache) == ["b/1", "b/3", "b/4"]
    assert cache.get("b/1", refuse).read_bytes() == b"1" * SIZE


def test_copies_in_use_stay_even_above_the_limit(cache) -> None:
    process = elsewhere(cache, "b/1", "b/2", "b/3", stays=True)
    try:
        used = [cache.get(f"m/{number}", writes(number)) for number in range(4)]
        assert len(copies(cache)) == 7
    finally:
        process.kill()
        process.communicate()
    used.append(cache.get("m/4", writes(4)))
    assert copies(cache) == [f"m/{number}" for number in range(5)]
    assert [path.read_bytes()[0] for path in used] == [0, 1, 2, 3, 4]


def test_a_copy_larger_than_the_limit_is_still_made(cache) -> None:
    elsewhere(cache, "b/1", "b/2")
    path = cache.get("large", lambda file: file.write_bytes(b"x" * 10 * SIZE))
    assert path.stat().st_size == 10 * SIZE
    assert copies(cache) == ["large"]


def test_without_a_limit_nothing_is_removed(tmp_path) -> None:
    cache = ReadCache(tmp_path, lambda: None)
    elsewhere(cache, "b/1", "b/2", "b/3")
    unlimited = ReadCache(tmp_path, lambda: None)
    unlimited.get("b/4", writes(4))
    assert len(copies(cache)) == 4


def test_using_a_copy_keeps_its_modification_time(cache) -> None:
    path = cache.get("b/1", writes(1))
    os.utime(path, (1, 1))
    cache.get("b/1", refuse)
    assert path.stat().st_mtime == 1
    assert path.stat().st_atime > 1


def test_a_fetch_that_fails_leaves_nothing(cache) -> None:
    def fail(file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "no space")

    with pytest.raises(OSError, match="no space"):
        cache.get("b/1", fail)
    assert copies(cache) == []
    assert list((cache.root / ".tmp").iterdir()) == []


def test_a_fresh_copy_replaces_one_that_is_open(cache) -> None:
    with cache.get("b/1", writes(1)).open("rb") as old:
        path = cache.get("b/1", writes(2), fresh=True)
        assert path.read_bytes() == b"\2" * SIZE
        assert old.read() == b"\1" * SIZE


def test_processes_that_fill_and_are_killed_leave_whole_copies_within_the_limit(cache) -> None:
    code = f"""
        import os, random
        from pathlib import Path
        from restitch.registry.store.read_cache import ReadCache
        cache = ReadCache(Path({str(cache.root)!r}), lambda: {20 * SIZE})
        print("on", flush=True)
        for turn in range(10 ** 6):
            number = random.randrange(100)
            fetch = lambda file: file.write_bytes(bytes([number]) * {SIZE})
            path = cache.get(f"c/{{number}}", fetch)
            assert path.read_bytes() == bytes([number]) * {SIZE}, path
    """
    for _ in range(3):
        processes = [start(code) for _ in range(2)]
        for process in processes:
            wait_for_line(process)
        time.sleep(0.15)
        for process in processes:
            assert process.poll() is None, "a copy was gone, or not whole"
            process.kill()
            process.communicate()
    for name in copies(cache):
        assert (cache.root / name).read_bytes() == bytes([int(name[2:])]) * SIZE
    cache.get("mine", writes(1))
    assert len(copies(cache)) <= 3
    assert len(list((cache.root / ".users").iterdir())) == 1
    cache.sweep(-1)
    assert list((cache.root / ".tmp").iterdir()) == []


def test_threads_get_the_same_copy(cache) -> None:
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda turn: cache.get(f"b/{turn % 2}", writes(7)), range(64)))
    assert {path.read_bytes() for path in paths} == {b"\7" * SIZE}


class TestFolders:
    """Copies that are folders, as unpacked models are."""

    @pytest.fixture
    def cache(self, tmp_path):
        return ReadCache(tmp_path / "cache", lambda: 3 * SIZE, folders=True)

    def keep(self, cache: ReadCache, name: str) -> Path:
        with cache.temporary() as made:
            made.mkdir()
            (made / "weights").write_bytes(b"x" * SIZE)
            cache.keep(name, made)
        return cache.root / name

    def elsewhere(self, cache: ReadCache, *names: str) -> None:
        """Keep folders in a process that ends."""
        code = f"""
            from pathlib import Path
            from restitch.registry.store.read_cache import ReadCache
            from tests.registry.store.test_read_cache import TestFolders
            cache = ReadCache(Path({str(cache.root)!r}), lambda: {3 * SIZE}, folders=True)
            for name in {names!r}:
                if not cache.use(name):
                    TestFolders().keep(cache, name)
        """
        assert start(code).wait() == 0

    def test_a_copied_folder_is_removed_whole(self, cache) -> None:
        self.elsewhere(cache, "a", "b", "c")
        self.elsewhere(cache, "a", "d")
        assert copies(cache) == ["a", "c", "d"]
        assert list((cache.root / ".tmp").iterdir()) == []
        assert cache.use("a")
        assert not cache.use("b")

    def test_a_folder_in_use_stays(self, cache) -> None:
        used = [self.keep(cache, name) for name in "abcde"]
        assert all((folder / "weights").is_file() for folder in used)
        self.elsewhere(cache, "f")
        assert copies(cache) == [*"abcdef"]

    def test_the_first_of_two_equal_folders_stays(self, cache) -> None:
        self.keep(cache, "a")
        (cache.root / "a" / "first").touch()
        self.keep(cache, "a")
        assert (cache.root / "a" / "first").exists()
        assert list((cache.root / ".tmp").iterdir()) == []


def test_a_copy_on_a_read_only_disk_can_be_used(cache, monkeypatch) -> None:
    cache.get("b/1", writes(1))

    def read_only(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("restitch.registry.store.read_cache._mark_used", read_only)
    assert cache.get("b/1", refuse).read_bytes() == b"\1" * SIZE


def test_an_emptied_cache_is_filled_again(cache) -> None:
    import shutil

    cache.get("b/1", writes(1))
    shutil.rmtree(cache.root)
    assert cache.get("b/1", writes(2)).read_bytes() == b"\2" * SIZE
    elsewhere(cache, "b/2", "b/3", "b/4", "b/5")
    assert "b/1" in copies(cache)


def test_the_limit_comes_from_the_environment(monkeypatch) -> None:
    monkeypatch.delenv("RESTITCH_CACHE_SIZE", raising=False)
    assert cache_limit() is None
    monkeypatch.setenv("RESTITCH_CACHE_SIZE", "2 KB")
    assert cache_limit() == 2000
    monkeypatch.setenv("RESTITCH_CACHE_SIZE", "much")
    with pytest.raises(BadInput, match="RESTITCH_CACHE_SIZE"):
        cache_limit()


def test_the_cache_of_a_bucket_stays_within_the_limit(s3_bucket, tmp_path, monkeypatch) -> None:
    code = f"""
        from pathlib import Path
        from restitch.registry.s3.store import S3Store
        store = S3Store({s3_bucket!r}, "cache/{tmp_path.name}", Path({str(tmp_path / "c")!r}))
        for number in range(5):
            store.put(f"blobs/{{number}}", bytes([number]) * {SIZE})
            assert store.local_path(f"blobs/{{number}}").read_bytes()[0] == number
    """
    monkeypatch.setenv("RESTITCH_CACHE_SIZE", "2KB")
    assert start(code).wait() == 0
    assert start(code.replace("range(5)", "range(1)")).wait() == 0
    kept = [path for path in (tmp_path / "c").rglob("blobs/*") if path.is_file()]
    assert len(kept) == 5, "what a living process had was removed"
    assert start(code.replace("range(5)", "range(5, 6)")).wait() == 0
    kept = [path for path in (tmp_path / "c").rglob("blobs/*") if path.is_file()]
    assert len(kept) == 2
    assert "5" in {path.name for path in kept}


def test_a_discarded_copy_is_gone_even_while_it_is_used(cache) -> None:
    path = cache.get("a", writes(1))
    cache.get("b", writes(2))
    cache.discard("a")
    cache.discard("c")
    assert not path.exists()
    assert copies(cache) == ["b"]
    assert cache.get("a", writes(1)).read_bytes() == bytes([1]) * SIZE
