"""Large content: in parts, a few at once, each part compared, and nothing half-done left."""

import os
import threading
from pathlib import Path

import pytest
from botocore.response import StreamingBody

from restitch.merging.errors import BadInput, Damage, Unavailable
from restitch.registry.s3 import retries, transfer
from restitch.registry.s3.client import client
from restitch.registry.s3.store import S3Store
from restitch.registry.store.base import NotInStore

PART = 5 << 20


@pytest.fixture
def store(s3_bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "PART", PART)
    monkeypatch.setattr(retries, "pause", lambda _: None)
    return S3Store(s3_bucket, f"parts/{tmp_path.name}", tmp_path / "cache")


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "large"
    file.write_bytes(os.urandom(4 * PART + 12345))
    return file


@pytest.fixture
def watched(monkeypatch, s3_account):
    """Watch a method of the client: how many calls there were at once, and with what."""

    def watch(name):
        call, lock, now, most, seen = getattr(client(), name), threading.Lock(), [0], [], []

        def seeing(**given):
            with lock:
                now[0] += 1
                most.append(now[0])
                seen.append(given)
            try:
                return call(**given)
            finally:
                with lock:
                    now[0] -= 1

        monkeypatch.setattr(client(), name, seeing)
        return most, seen

    return watch


@pytest.fixture
def flipped(monkeypatch):
    """Alter one byte of each of the next reads that have any, as many as are asked for."""
    left = [0]
    read = StreamingBody.read

    def altering(self, amt=None):
        found = read(self, amt)
        if found and left[0]:
            left[0] -= 1
            return bytes([found[0] ^ 1]) + found[1:]
        return found

    monkeypatch.setattr(StreamingBody, "read", altering)

    def flip(times: int) -> None:
        left[0] = times

    return flip


def left_uploads(store: S3Store) -> list[str]:
    return [key for key, *_ in store._uploads()]


def test_few_parts_are_in_flight_and_none_is_larger_than_a_part(store, file, watched) -> None:
    most, sent = watched("upload_part")
    assert store.put("name", file)
    assert len(sent) == 5
    assert max(most) <= transfer.IN_FLIGHT
    assert max(len(given["Body"]) for given in sent) == PART
    most, got = watched("get_object")
    assert store.local_path("name").read_bytes() == file.read_bytes()
    assert max(most) <= transfer.IN_FLIGHT
    assert sorted(given["Range"] for given in got if "Range" in given)[0] == f"bytes=0-{PART - 1}"
    assert {given.get("IfMatch") for given in got[1:]} == {store._head("name").etag}


def test_every_request_that_writes_carries_a_checksum(store, file, watched) -> None:
    sent = [seen for _, seen in map(watched, ("put_object", "upload_part"))]
    store.put("large", file)
    store.put("small", b"content")
    store.swap("head", None, b"content")
    written = [given for seen in sent for given in seen]
    assert len(written) == 7
    for given in written:
        assert given["ChecksumCRC32"] == transfer._checked(given["Body"])["ChecksumCRC32"]


def test_content_that_arrives_altered_at_the_server_is_sent_again(store, monkeypatch) -> None:
    put, answers = client().put_object, ["AAAAAA==", "AAAAAA=="]

    def lying(**given):
        del given["IfNoneMatch"]
        return {**put(**given), **({"ChecksumCRC32": answers.pop()} if answers else {})}

    store.put("before", b"")
    monkeypatch.setattr(client(), "put_object", lying)
    assert store.put("name", b"content")
    assert answers == []


@pytest.mark.parametrize("size", [10, 4 * PART + 12345])
def test_content_that_is_altered_on_its_way_is_fetched_again(
    store, tmp_path, flipped, size
) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(size))
    store.put("name", file)
    flipped(3)
    assert store.local_path("name").read_bytes() == file.read_bytes()
    store.swap("head", None, b"content")
    flipped(3)
    assert store.read("head") == b"content"


@pytest.mark.parametrize("size", [10, 4 * PART + 12345])
def test_content_that_is_altered_at_the_server_is_damage(store, tmp_path, flipped, size) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(size))
    store.put("name", file)
    flipped(10**6)
    with pytest.raises(Damage, match="name"):
        store.local_path("name")
    if size == 10:
        with pytest.raises(Damage, match="cannot read name"):
            store.read("name")
    assert not [path for path in store.cache.root.rglob("name") if path.is_file()]


def test_an_endless_body_is_given_up(store, monkeypatch) -> None:
    store.put("name", b"content")
    monkeypatch.setattr(retries, "_GRACE", -1.0)
    with pytest.raises(Unavailable, match="does not answer"):
        store.read("name")


def test_an_upload_that_fails_is_aborted(store, file, monkeypatch) -> None:
    def refuse(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(client(), "complete_multipart_upload", refuse)
    with pytest.raises(Unavailable):
        store.put("name", file)
    assert left_uploads(store) == []
    with pytest.raises(NotInStore):
        store.read("name")


def test_a_file_that_changes_while_it_is_sent_is_not_published(store, file, monkeypatch) -> None:
    upload = client().upload_part

    def meanwhile(**given):
        with file.open("ab") as out:
            out.write(b"more")
        return upload(**given)

    monkeypatch.setattr(client(), "upload_part", meanwhile)
    with pytest.raises(BadInput, match="changed while it was read"):
        store.put("name", file)
    assert left_uploads(store) == []
    with pytest.raises(NotInStore):
        store.read("name")


def test_an_object_of_another_program_is_read_without_digests(
    store, file, s3_client, s3_bucket
) -> None:
    s3_client.put_object(Bucket=s3_bucket, Key=f"{store.prefix}/name", Body=file.read_bytes())
    assert store.local_path("name").read_bytes() == file.read_bytes()


def test_the_digests_of_a_very_large_file_fit_into_its_metadata(tmp_path) -> None:
    file = tmp_path / "sparse"
    with file.open("wb") as out:
        out.truncate(300 << 20)
    ranges = _ranges(file, part=1 << 20)
    length, digests = transfer._read_ranges({transfer.RANGES: ranges}, 300 << 20)
    assert (length, len(digests)) == (2 << 20, 150)
    assert len(ranges) + 300 < 2048


def _ranges(file: Path, part: int) -> str:
    kept = transfer.PART
    transfer.PART = part
    try:
        with file.open("rb") as source:
            return transfer._ranges_of(source.fileno(), file.stat().st_size)
    finally:
        transfer.PART = kept


class TestSettings:
    @pytest.fixture
    def kept(self, store, s3_client, s3_bucket):
        """The answer of the server about an object."""

        def look(name):
            return s3_client.head_object(Bucket=s3_bucket, Key=f"{store.prefix}/{name}")

        return look

    def test_encryption_and_storage_class_are_requested(
        self, store, file, kept, monkeypatch
    ) -> None:
        monkeypatch.setenv("RESTITCH_S3_ENCRYPTION", "aws:kms")
        monkeypatch.setenv("RESTITCH_S3_KMS_KEY", "the-key")
        monkeypatch.setenv("RESTITCH_S3_STORAGE_CLASS", "STANDARD_IA")
        store.put("blobs/large", file)
        store.put("blobs/small", b"content")
        store.swap("head", None, b"content")
        for name in ("blobs/large", "blobs/small", "head"):
            assert kept(name)["ServerSideEncryption"] == "aws:kms"
            assert kept(name)["SSEKMSKeyId"] == "the-key"
        assert kept("blobs/large")["StorageClass"] == "STANDARD_IA"
        assert kept("blobs/small")["StorageClass"] == "STANDARD_IA"
        assert "StorageClass" not in kept("head")
        assert store.read("blobs/small") == b"content"

    def test_without_settings_the_bucket_decides(self, store, kept) -> None:
        store.put("blobs/a", b"content")
        assert "SSEKMSKeyId" not in kept("blobs/a")
        assert "StorageClass" not in kept("blobs/a")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("RESTITCH_S3_ENCRYPTION", "rot13"),
            ("RESTITCH_S3_STORAGE_CLASS", "DEEP_ARCHIVE"),
        ],
    )
    def test_an_invalid_setting_is_refused(self, store, monkeypatch, name, value) -> None:
        monkeypatch.setenv(name, value)
        with pytest.raises(BadInput, match=name) as raised:
            store.put("blobs/a", b"content")
        assert value not in str(raised.value).replace("STANDARD", "")
        monkeypatch.delenv(name)
        assert list(store.list()) == []

    def test_a_key_means_kms_and_not_another_encryption(self, store, monkeypatch) -> None:
        monkeypatch.setenv("RESTITCH_S3_KMS_KEY", "the-key")
        assert store.put("a", b"content")
        monkeypatch.setenv("RESTITCH_S3_ENCRYPTION", "AES256")
        with pytest.raises(BadInput, match="takes a key"):
            store.put("b", b"content")
