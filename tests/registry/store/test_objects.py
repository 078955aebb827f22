import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from restitch.merging.digests import digest_bytes
from restitch.merging.errors import BadInput, Damage
from restitch.registry.store.folder import FolderStore
from restitch.registry.store.objects import ObjectStore
from tests.registry.builders import digest


@pytest.fixture
def objects(tmp_path):
    return ObjectStore(FolderStore(tmp_path / "store"))


def alter(path: Path, data: bytes = b"altered") -> None:
    path.write_bytes(data)


def test_a_blob_is_found_by_the_digest_of_its_bytes(objects, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"content")
    found = objects.put_blob(b"content")
    assert found == digest_bytes(b"content") == objects.put_blob(file)
    assert objects.read_blob(found) == b"content"
    assert objects.blob_path(found).read_bytes() == b"content"
    assert list(objects.store.list()) == [f"blobs/{found}"]


def test_the_digest_of_json_does_not_depend_on_the_order_of_its_keys(objects):
    assert objects.put_json({"a": 1, "b": 2}) == objects.put_json({"b": 2, "a": 1})


def test_an_altered_blob_is_damage_and_never_returned(objects):
    blob = objects.put_blob(b"content")
    objects.blob_path(blob)
    alter(objects.store.root / "blobs" / blob)
    for read in (objects.read_blob, objects.blob_path):
        with pytest.raises(Damage, match=f"blobs/{blob}") as raised:
            read(blob)
        assert raised.value.hint
        assert raised.value.found == digest_bytes(b"altered")


def test_an_altered_blob_of_the_same_size_and_time_is_damage_for_a_new_process(objects):
    blob = objects.put_blob(b"content")
    path = objects.blob_path(blob)
    state = path.stat()
    alter(path, b"CONTENT")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(Damage):
        ObjectStore(objects.store).blob_path(blob)


def test_a_missing_blob_is_damage(objects):
    for read in (objects.read_blob, objects.blob_path):
        with pytest.raises(Damage, match="missing"):
            read(digest("nothing"))


def test_a_blob_is_verified_once_while_it_stays_unchanged(objects, monkeypatch):
    blob = objects.put_blob(b"content")
    objects.blob_path(blob)
    monkeypatch.setattr(
        "restitch.registry.store.objects.digest_file", lambda _path: pytest.fail("read again")
    )
    objects.blob_path(blob)


def test_a_file_whose_writer_knows_its_digest_is_not_read_until_its_blob_is(
    objects, tmp_path, monkeypatch
):
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.write_bytes(b"content")
    wrong.write_bytes(b"other content")
    with monkeypatch.context() as unread:
        unread.setattr(
            "restitch.registry.store.objects.digest_file", lambda _path: pytest.fail("read")
        )
        found = objects.put_blob(right, move=True, digest=digest_bytes(b"content"))
        lie = objects.put_blob(wrong, move=True, digest=digest("a lie"))
    assert objects.blob_path(found).read_bytes() == b"content"
    with pytest.raises(Damage, match=lie):
        objects.blob_path(lie)


def test_a_key_names_the_result_of_its_inputs(objects):
    blob = objects.put_blob(b"content")
    assert objects.lookup("mask", digest("inputs")) is None
    made = objects.publish(
        "mask", digest("inputs"), blob, {"host": "a"}, {"torch": "2"}, {"kept": 3}
    )
    assert made == objects.lookup("mask", digest("inputs"))
    assert (made.blob, made.size, made.made_by, made.fingerprint, made.facts) == (
        blob,
        7,
        {"host": "a"},
        {"torch": "2"},
        {"kept": 3},
    )


def test_the_first_published_mask_wins(objects):
    first, second = objects.put_blob(b"first"), objects.put_blob(b"second")
    objects.publish("mask", digest("inputs"), first)
    assert objects.publish("mask", digest("inputs"), second).blob == first
    assert objects.lookup("mask", digest("inputs")).blob == first


def test_of_many_publishers_all_get_the_same_winner(objects):
    blobs = [objects.put_blob(str(n).encode()) for n in range(16)]
    with ThreadPoolExecutor(16) as pool:
        records = list(pool.map(lambda b: objects.publish("mask", digest("i"), b), blobs))
    assert len({record.blob for record in records}) == 1


def test_a_blob_must_be_stored_before_its_key(objects):
    with pytest.raises(Damage, match="missing"):
        objects.publish("mask", digest("inputs"), digest("nothing"))
    assert objects.lookup("mask", digest("inputs")) is None


def test_an_unreadable_key_is_damage(objects):
    objects.store.put(f"keys/mask/{digest('inputs')}", b'{"blob": 3}')
    with pytest.raises(Damage, match="keys/mask"):
        objects.lookup("mask", digest("inputs"))


def test_a_kind_cannot_leave_the_keys(objects):
    with pytest.raises(BadInput):
        objects.lookup("../blobs", digest("inputs"))


def test_a_file_that_changes_while_it_is_read_is_refused(objects, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_bytes(b"content")
    put = objects.store.put

    def changed(*args, **keywords):
        alter(file, b"longer content")
        return put(*args, **keywords)

    monkeypatch.setattr(objects.store, "put", changed)
    with pytest.raises(BadInput, match="changed while it was read"):
        objects.put_blob(file)
