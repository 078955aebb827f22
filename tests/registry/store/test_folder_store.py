import errno
import os
import time

import pytest

from restitch.merging.errors import BadInput, Unavailable
from restitch.registry.store.folder import FolderStore
from tests.registry.store_contract import StoreContract


class TestFolderStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path):
        return FolderStore(tmp_path / "store")

    @pytest.fixture
    def opener(self, tmp_path):
        return f"FolderStore(Path({str(tmp_path / 'store')!r}))"

    def test_reading_creates_no_folder(self, store):
        assert list(store.list()) == []
        assert not store.root.exists()

    def test_leftovers_are_swept_by_age_and_objects_are_not(self, store):
        store.put("object", b"")
        for name, age in (("old", 7200), ("young", 60)):
            path = store.root / ".tmp" / name
            path.write_bytes(b"half")
            os.utime(path, (time.time() - age,) * 2)
        os.utime(store.root / "object", (0, 0))
        assert store.sweep(older_than=3600) == 1
        assert [path.name for path in (store.root / ".tmp").iterdir()] == ["young"]
        assert store.read("object") == b""

    def test_a_put_leaves_no_leftover(self, store):
        store.put("object", b"")
        store.put("object", b"")
        store.swap("head", None, b"")
        store.swap("head", None, b"")
        assert list((store.root / ".tmp").iterdir()) == []

    def test_leftovers_and_locks_are_not_listed(self, store):
        store.swap("head", None, b"")
        (store.root / ".tmp" / "half").write_bytes(b"")
        assert list(store.list()) == ["head"]

    def test_a_leftover_lock_file_blocks_nobody(self, store):
        tag = store.swap("head", None, b"1")
        assert list((store.root / ".locks").iterdir())
        assert FolderStore(store.root).swap("head", tag, b"2") is not None

    def test_without_hard_links_the_first_writer_still_wins(self, store, tmp_path, monkeypatch):
        def refuse(*_):
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr("restitch.registry.store.folder.os.link", refuse)
        file = tmp_path / "file"
        file.write_bytes(b"first")
        assert store.put("name", file, move=True)
        assert not store.put("name", b"second")
        assert store.read("name") == b"first"
        assert not file.exists()

    def test_a_full_disk_is_an_error_and_leaves_nothing(self, store, monkeypatch):
        def full(_descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        store.put("before", b"")
        monkeypatch.setattr("restitch.registry.store.disk.os.fsync", full)
        with pytest.raises(Unavailable, match="free some disk space") as raised:
            store.put("name", b"content")
        assert str(store.root) in str(raised.value)
        monkeypatch.undo()
        assert list(store.list()) == ["before"]
        assert list((store.root / ".tmp").iterdir()) == []

    @pytest.mark.parametrize(
        ("code", "hint"),
        [(errno.EACCES, "permission"), (errno.EROFS, "read-only"), (errno.EDQUOT, "quota")],
    )
    def test_errors_of_the_disk_say_what_to_do(self, store, monkeypatch, code, hint):
        def refuse(*_):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr("restitch.registry.store.disk.os.fsync", refuse)
        with pytest.raises(Unavailable, match=hint):
            store.put("name", b"")
        with pytest.raises(Unavailable, match=hint):
            store.swap("name", None, b"")

    def test_a_file_in_the_way_of_the_store_is_an_error(self, tmp_path):
        (tmp_path / "store").write_bytes(b"")
        with pytest.raises(Unavailable, match="in the way"):
            FolderStore(tmp_path / "store").put("name", b"")

    def test_a_missing_file_cannot_be_put(self, store, tmp_path):
        for move in (False, True):
            with pytest.raises(BadInput, match="gone does not exist"):
                store.put("name", tmp_path / "gone", move=move)
        assert list(store.list()) == []
