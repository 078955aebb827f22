"""A server that ignores conditional writes: nobody writes through it, or one who is alone."""

from collections.abc import Callable

import pytest

from restitch.merging.errors import Unavailable
from restitch.registry.s3 import conditional_writes
from restitch.registry.s3.client import client
from restitch.registry.s3.store import S3Store
from tests.shell import Shell

CONDITIONS = ("IfMatch", "IfNoneMatch")


@pytest.fixture
def careless(s3_bucket, monkeypatch):
    """A server that takes conditional writes for plain ones."""
    for name in ("put_object", "complete_multipart_upload"):
        call = getattr(client(), name)

        def ignoring(call=call, **given):
            return call(**{key: value for key, value in given.items() if key not in CONDITIONS})

        monkeypatch.setattr(client(), name, ignoring)
    monkeypatch.setattr(conditional_writes, "_known", {})


@pytest.fixture
def store(s3_bucket, tmp_path):
    return S3Store(s3_bucket, f"conditions/{tmp_path.name}", tmp_path / "cache")


@pytest.mark.usefixtures("careless")
def test_nothing_is_written_through_a_server_that_ignores_conditions(store, tmp_path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"content")
    writes: list[Callable[[], object]] = [
        lambda: store.put("name", b"content"),
        lambda: store.put("name", file),
        lambda: store.swap("head", None, b"content"),
    ]
    for write in writes:
        with pytest.raises(Unavailable, match="ignores conditional writes") as raised:
            write()
        assert "RESTITCH_SINGLE_WRITER=1" in str(raised.value)
    assert list(store.list()) == []
    assert file.exists()


@pytest.mark.usefixtures("careless")
def test_a_single_writer_needs_no_conditional_writes(store, monkeypatch) -> None:
    monkeypatch.setenv("RESTITCH_SINGLE_WRITER", "1")
    assert store.put("name", b"content")
    assert not store.put("name", b"other")
    assert store.read("name") == b"content"
    first = store.swap("head", None, b"1")
    assert store.swap("head", None, b"x") is None
    second = store.swap("head", first, b"2")
    assert store.swap("head", first, b"x") is None
    assert store.read_tagged("head") == (b"2", second)


@pytest.mark.usefixtures("careless")
def test_without_the_promise_of_a_single_writer_writing_ends(store, monkeypatch) -> None:
    monkeypatch.setenv("RESTITCH_SINGLE_WRITER", "1")
    store.put("name", b"content")
    monkeypatch.setenv("RESTITCH_SINGLE_WRITER", "0")
    with pytest.raises(Unavailable, match="ignores conditional writes"):
        store.put("other", b"content")
    assert store.read("name") == b"content"


def test_a_server_that_refuses_all_conditional_writes_is_detected(
    s3_bucket, store, monkeypatch
) -> None:
    from botocore.exceptions import ClientError

    put = client().put_object

    def refusing(**given):
        if any(name in given for name in CONDITIONS):
            answer = {"Error": {"Code": "NotImplemented"}}
            raise ClientError({**answer, "ResponseMetadata": {"HTTPStatusCode": 501}}, "PutObject")
        return put(**given)

    monkeypatch.setattr(client(), "put_object", refusing)
    monkeypatch.setattr(conditional_writes, "_known", {})
    with pytest.raises(Unavailable, match="ignores conditional writes"):
        store.put("name", b"content")
    monkeypatch.setenv("RESTITCH_SINGLE_WRITER", "1")
    assert store.put("name", b"content")


def test_a_server_is_probed_once(s3_bucket, store, monkeypatch, s3_client) -> None:
    asked = []
    tried = conditional_writes.probe_conditional_writes

    def asking(*place):
        asked.append(place)
        return tried(*place)

    monkeypatch.setattr(conditional_writes, "probe_conditional_writes", asking)
    for _process in range(2):
        monkeypatch.setattr(conditional_writes, "_known", {})
        store.put("name", b"content")
        store.swap("head", None, b"content")
    assert len(asked) == 1
    keys = s3_client.list_objects_v2(Bucket=s3_bucket, Prefix=store.prefix)["Contents"]
    assert len(keys) == 2, "the probe is still there"


@pytest.fixture
def checked(store, new_home):
    """The checks of doctor for conditional writes."""
    shell = Shell(new_home("home").home, {"RESTITCH_STORE": f"s3://{store.bucket}/{store.prefix}"})

    def check():
        checks = shell.json("doctor", code=None)["checks"]
        [found] = [each for each in checks if each["name"] == "conditional writes"]
        return found

    return check


def test_doctor_reports_that_a_server_supports_conditional_writes(checked) -> None:
    assert checked()["status"] == "ok"


@pytest.mark.usefixtures("careless")
def test_doctor_reports_that_a_server_ignores_conditions(checked, monkeypatch) -> None:
    assert checked()["status"] == "failed"
    assert "RESTITCH_SINGLE_WRITER=1" in checked()["remedy"]
    monkeypatch.setenv("RESTITCH_SINGLE_WRITER", "1")
    assert checked()["status"] == "warning"
