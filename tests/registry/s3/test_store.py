import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from botocore.exceptions import ConnectionClosedError, ReadTimeoutError
from botocore.httpsession import URLLib3Session

from restitch.merging.errors import BadInput, Damage, Unavailable
from restitch.registry.home import Home
from restitch.registry.s3 import client as s3_client
from restitch.registry.s3 import conditional_writes, retries, transfer
from restitch.registry.s3 import store as s3_store
from restitch.registry.s3.client import parse_address
from restitch.registry.s3.store import S3Store
from restitch.registry.store.objects import ObjectStore
from tests.registry.store_contract import StoreContract, count_up, start
from tests.servers import PAGE

SECRETS = ("the-key-id", "the-secret", "pass-word")


@pytest.fixture
def prefix(tmp_path):
    """A place of its own for each test in the one bucket."""
    return f"tests/{tmp_path.name.replace('[', '-').replace(']', '-')}"


@pytest.fixture
def store(s3_bucket, prefix, tmp_path):
    conditional_writes.check_conditional_writes(
        s3_bucket, prefix, tmp_path
    )  # asked once, and not among what is counted
    return S3Store(s3_bucket, prefix, tmp_path / "cache")


@pytest.fixture
def opener(s3_bucket, prefix, tmp_path):
    module = "__import__('restitch.registry.s3.store').registry.s3.store"
    return f"{module}.S3Store({s3_bucket!r}, {prefix!r}, Path({str(tmp_path / 'cache')!r}))"


class TestS3Store(StoreContract):
    lives_up_to = 0.6

    @pytest.fixture
    def store(self, s3_bucket, prefix, tmp_path):
        return S3Store(s3_bucket, prefix, tmp_path / "cache")

    @pytest.fixture
    def opener(self, opener):
        return opener


@pytest.fixture
def lose_answers(monkeypatch):
    """Let writes happen and their answers get lost: those whose method stands in their place."""
    left: list[str] = []
    send = URLLib3Session.send

    def lossy(self, request):
        answer = send(self, request)
        if left and request.method in ("PUT", "POST") and request.method == left.pop(0):
            raise ConnectionClosedError(endpoint_url=request.url)
        return answer

    monkeypatch.setattr(URLLib3Session, "send", lossy)
    return left.extend


@pytest.fixture
def requests(monkeypatch):
    """The methods of all requests from here on."""
    made: list[str] = []
    send = URLLib3Session.send

    def seen(self, request):
        made.append(request.method)
        return send(self, request)

    monkeypatch.setattr(URLLib3Session, "send", seen)
    return made


class TestLostAnswers:
    def test_a_put_with_a_lost_answer_is_recognized(self, store, lose_answers, tmp_path):
        lose_answers(["PUT"])
        assert store.put("name", b"content")
        assert not store.put("name", b"content")
        file = tmp_path / "file"
        file.write_bytes(b"x" * 100_000)
        lose_answers(["PUT"])
        assert store.put("file", file)
        assert store.read("file") == b"x" * 100_000

    def test_a_swap_with_a_lost_answer_is_recognized(self, store, lose_answers):
        lose_answers(["PUT"])
        first = store.swap("head", None, b"1")
        assert first == store.read_tagged("head").tag
        lose_answers(["PUT"])
        second = store.swap("head", first, b"2")
        assert store.read_tagged("head") == (b"2", second)
        assert store.swap("head", first, b"3") is None

    def test_a_swap_with_a_lost_answer_counts_even_if_others_followed(self, store, monkeypatch):
        first = store.swap("head", None, b"0")
        _overtake(monkeypatch, store, 8)
        ours = store.swap("head", first, b"ours")
        assert ours is not None
        assert store.read("head") == b"8"
        assert store.swap("head", ours, b"late") is None
        assert store.swap("head", first, b"late") is None

    def test_equal_content_of_another_writer_is_not_taken_for_ours(self, store):
        assert store.put("name", b"content")
        assert not store.put("name", b"content")
        assert store.swap("name", None, b"content") is None

    def test_each_of_many_writers_with_lost_answers_counts_once(self, store, lose_answers):
        lose_answers(["PUT", "-", "-", "-", "PUT"])

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda _: count_up(store), range(20)))
        # Also where another swap has followed before the answer was missed.
        assert store.read("count") == b"20"

    def test_a_swap_with_a_lost_answer_and_too_many_successors_is_an_error(
        self, store, monkeypatch
    ):
        monkeypatch.setattr(s3_store, "_REMEMBERED", 4)
        first = store.swap("head", None, b"0")
        _overtake(monkeypatch, store, 9)
        with pytest.raises(Unavailable, match="cannot tell whether head was written"):
            store.swap("head", first, b"ours")
        # Whose answer came is refused as ever, however many followed what it expects.
        assert store.swap("head", first, b"late") is None

    def test_an_interrupted_read_is_repeated(self, store, monkeypatch):
        monkeypatch.setattr(retries, "pause", lambda _seconds: None)
        store.put("name", b"content" * 1000)
        breaks = _breaking_bodies(monkeypatch, 2)
        assert store.read("name") == b"content" * 1000
        breaks.extend([1, 1])
        assert store.local_path("name").read_bytes() == b"content" * 1000
        breaks.extend([1] * 10)
        with pytest.raises(Unavailable, match="cannot read name"):
            store.read("name")


def _overtake(monkeypatch: pytest.MonkeyPatch, store: S3Store, times: int) -> None:
    """Let the next swap of `head` take effect, and others follow before its answer is missed."""
    send = URLLib3Session.send
    others = [*range(1, times + 1)]

    def overtaken(self, request):
        answer = send(self, request)
        if request.method == "PUT" and others and others.pop(0) == 1:
            while others:
                tag = store.read_tagged("head").tag
                assert store.swap("head", tag, str(others[0]).encode())
            raise ConnectionClosedError(endpoint_url=request.url)
        return answer

    monkeypatch.setattr(URLLib3Session, "send", overtaken)


def _breaking_bodies(monkeypatch: pytest.MonkeyPatch, times: int) -> list[int]:
    from botocore.exceptions import ResponseStreamingError
    from botocore.response import StreamingBody

    left = [1] * times
    read = StreamingBody.read

    def broken(self, amt=None):
        found = read(self, amt)
        if left:
            left.pop()
            raise ResponseStreamingError(error="cut")
        return found

    monkeypatch.setattr(StreamingBody, "read", broken)
    return left


class TestConflicts:
    def test_a_write_is_repeated_when_the_server_asks_for_it(self, store, monkeypatch):
        answers = [409, 409]
        _refuse(monkeypatch, answers, "ConditionalRequestConflict")
        assert store.put("name", b"content")
        assert answers == []
        answers.append(409)
        assert store.swap("name", store.read_tagged("name").tag, b"other")
        assert store.read("name") == b"other"

    def test_a_swap_of_a_removed_object_changes_nothing(self, store, s3_client, prefix):
        tag = store.swap("head", None, b"1")
        s3_client.delete_object(Bucket="bucket", Key=f"{prefix}/head")
        assert store.swap("head", tag, b"2") is None


def _refuse(monkeypatch: pytest.MonkeyPatch, answers: list[int], code: str) -> None:
    """Let the next writes be refused by the server, one for each status."""
    from botocore.exceptions import ClientError

    send = S3Store._send

    def refused(self, *arguments):
        if answers:
            metadata = {"HTTPStatusCode": answers.pop(0)}
            answer = {"Error": {"Code": code}, "ResponseMetadata": metadata}
            raise ClientError(answer, "PutObject")
        return send(self, *arguments)

    monkeypatch.setattr(S3Store, "_send", refused)


class TestLargeFiles:
    @pytest.fixture
    def file(self, monkeypatch, tmp_path):
        monkeypatch.setattr(transfer, "PART", 5 << 20)
        file = tmp_path / "large"
        file.write_bytes(bytes(range(256)) * (12 << 12))
        return file

    def test_a_large_file_is_uploaded_in_parts(self, store, file):
        assert store.put("name", file)
        assert store.local_path("name").read_bytes() == file.read_bytes()
        assert not store.put("name", file)

    def test_the_first_of_two_uploads_to_complete_stays(self, store, file, monkeypatch):
        monkeypatch.setattr(S3Store, "_head", lambda *_: None)  # neither sees the other begin
        assert store.put("name", file)
        whole = file.read_bytes()
        file.write_bytes(b"x" * len(whole))
        assert not store.put("name", file)
        assert store.read("name") == whole
        assert store.sweep(0) == 0, "the upload that lost was not aborted"

    def test_a_completion_with_a_lost_answer_is_recognized(self, store, file, lose_answers):
        # The beginning, the first of three parts, and the completion.
        lose_answers(["POST", "-", "PUT", "-", "-", "-", "POST"])
        assert store.put("name", file)
        assert store.read("name") == file.read_bytes()

    def test_abandoned_uploads_are_swept_by_age(self, store, s3_client, prefix):
        for place in (prefix, "elsewhere"):
            s3_client.create_multipart_upload(Bucket="bucket", Key=f"{place}/name")
        # This server says of each upload that it began in 2010.
        assert store.sweep(older_than=time.time()) == 0
        assert store.sweep(older_than=3600) == 1
        left = s3_client.list_multipart_uploads(Bucket="bucket")["Uploads"]
        assert f"{prefix}/name" not in [upload["Key"] for upload in left]


class TestCache:
    def test_a_cached_copy_is_not_downloaded_again(self, store, requests):
        store.put("blobs/a", b"content")
        store.local_path("blobs/a")
        requests.clear()
        assert store.local_path("blobs/a").read_bytes() == b"content"
        assert requests == []

    def test_the_copy_of_a_removed_object_is_removed(self, store):
        store.put("blobs/a", b"secret")
        copy = store.local_path("blobs/a")
        assert copy.read_bytes() == b"secret"
        store.remove("blobs/a")
        assert not copy.exists()

    def test_an_existing_object_is_not_uploaded_again(self, store, requests, tmp_path):
        file = tmp_path / "file"
        file.write_bytes(b"content")
        assert store.put("name", file)
        requests.clear()
        assert not store.put("name", file)
        assert requests == ["HEAD"]

    def test_a_moved_file_is_not_downloaded(self, store, requests, tmp_path):
        file = tmp_path / "file"
        file.write_bytes(b"content")
        store.put("name", file, move=True)
        requests.clear()
        assert store.local_path("name").read_bytes() == b"content"
        assert requests == []

    def test_a_killed_download_is_never_read(self, store, opener, tmp_path):
        store.put("name", bytes(range(256)) * 100_000)
        code = f"""
            import os
            from pathlib import Path
            from botocore.response import StreamingBody
            read, calls = StreamingBody.read, []
            def dies(self, amt=None):
                calls.append(amt)
                return read(self, amt) if len(calls) < 9 else os.kill(os.getpid(), 9)
            StreamingBody.read = dies
            {opener}.local_path("name")
        """
        assert start(code).wait() == -9
        cache = tmp_path / "cache"
        assert [path for path in cache.rglob("*") if path.name == "name"] == []
        assert store.local_path("name").read_bytes() == bytes(range(256)) * 100_000
        (half,) = (cache / ".tmp").iterdir()
        assert half.stat().st_size > 0
        os.utime(half, (time.time() - 7200,) * 2)
        assert store.sweep(older_than=3600) == 1
        assert list((cache / ".tmp").iterdir()) == []

    def test_a_damaged_copy_is_fetched_again_and_a_damaged_object_is_damage(
        self, store, s3_client, prefix
    ):
        objects = ObjectStore(store)
        blob = objects.put_blob(b"content")
        path = objects.blob_path(blob)
        path.write_bytes(b"altered")
        assert objects.blob_path(blob).read_bytes() == b"content"
        s3_client.put_object(Bucket="bucket", Key=f"{prefix}/blobs/{blob}", Body=b"altered")
        path.unlink()
        for read in (objects.read_blob, objects.blob_path):
            with pytest.raises(Damage, match=f"blobs/{blob}"):
                read(blob)

    def test_a_disk_that_refuses_the_copy_is_an_error(self, s3_bucket, prefix, tmp_path):
        (tmp_path / "cache").write_bytes(b"")
        store = S3Store(s3_bucket, prefix, tmp_path / "cache")
        store.put("name", b"content")
        with pytest.raises(Unavailable, match="in the way"):
            store.local_path("name")


def test_a_long_listing_is_in_order_and_without_other_objects(store, s3_client, prefix, s3_bucket):
    names = [f"n/{number}" for number in range(PAGE + 10)]

    def make(name):
        s3_client.put_object(Bucket=s3_bucket, Key=name, Body=b"")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(make, [f"{prefix}/{name}" for name in names]))
        list(pool.map(make, [f"{prefix}/n/.hidden", f"{prefix}/n/", f"{prefix}-other/n/1"]))
    assert list(store.list("n")) == sorted(names)
    assert list(store.list()) == sorted(names)


class TestErrors:
    @pytest.fixture
    def refused(self, store):
        """The message of each operation; all are Unavailable and none contains a secret."""

        def messages() -> list[str]:
            found = []
            for call in (
                lambda: store.put("name", b""),
                lambda: store.put("name", Path(__file__)),
                lambda: store.read("name"),
                lambda: store.swap("name", None, b""),
                lambda: store.swap("name", "x", b""),
                lambda: store.local_path("name"),
                lambda: list(store.list()),
                lambda: store.sweep(0),
            ):
                with pytest.raises(Unavailable) as raised:
                    call()
                assert raised.value.exit_code == 6
                assert not any(secret in str(raised.value) for secret in SECRETS)
                assert raised.value.__cause__ is None
                found.append(str(raised.value))
            return found

        return messages

    def test_an_unreachable_server_is_an_error(self, refused, monkeypatch):
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:pass-word@127.0.0.1:9")
        monkeypatch.setattr("restitch.registry.s3.retries.pause", lambda _seconds: None)
        assert all("AWS_ENDPOINT_URL" in text for text in refused())

    def test_a_silent_server_is_asked_a_limited_number_of_times(self, store, monkeypatch):
        asked = []

        def silent(_self, request):
            asked.append(request.method)
            raise ReadTimeoutError(endpoint_url=request.url)

        monkeypatch.setattr(URLLib3Session, "send", silent)
        monkeypatch.setattr("restitch.registry.s3.retries.pause", lambda _seconds: None)
        with pytest.raises(Unavailable, match="does not answer"):
            store.read("name")
        assert asked == ["GET"] * 8

    def test_a_missing_bucket_is_an_error(self, s3_account, tmp_path):
        store = S3Store("no-bucket", "prefix", tmp_path)
        for call in (store.read, store.local_path, lambda name: store.put(name, b"")):
            with pytest.raises(Unavailable, match="create the bucket of s3://no-bucket/prefix"):
                call("name")
        with pytest.raises(Unavailable, match="NoSuchBucket"):
            list(store.list())

    def test_missing_credentials_are_an_error_that_names_the_variables(self, refused, monkeypatch):
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        assert all("AWS_SECRET_ACCESS_KEY" in text for text in refused())

    @pytest.mark.parametrize(
        ("code", "status", "hint"),
        [
            ("AccessDenied", 403, "give these credentials the right"),
            ("SignatureDoesNotMatch", 403, "does not accept the credentials"),
            ("ExpiredToken", 400, "does not accept the credentials"),
            ("InsufficientStorage", 507, "look at the server's log"),
        ],
    )
    def test_refusals_of_the_server_are_explained(self, store, monkeypatch, code, status, hint):
        _refuse(monkeypatch, [status], code)
        with pytest.raises(Unavailable, match=hint) as raised:
            store.put("name", b"")
        assert f"{code} (HTTP {status})" in str(raised.value)

    def test_a_server_need_not_list_uploads(self, store, monkeypatch):
        from botocore.exceptions import ClientError

        class Plain:
            def list_multipart_uploads(self, **_):
                answer = {"ResponseMetadata": {"HTTPStatusCode": 501}}
                raise ClientError({"Error": {"Code": "NotImplemented"}, **answer}, "List")

        monkeypatch.setattr(retries, "client", Plain)
        assert store.sweep(0) == 0

    def test_an_invalid_address_of_the_server_is_bad_input(self, store, monkeypatch):
        monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1 pass-word")
        with pytest.raises(BadInput, match="AWS_ENDPOINT_URL") as raised:
            store.read("name")
        assert "pass-word" not in str(raised.value)

    def test_a_missing_file_cannot_be_put(self, store, tmp_path):
        with pytest.raises(BadInput, match="gone does not exist"):
            store.put("name", tmp_path / "gone")


@pytest.mark.parametrize(
    "address",
    [
        "s3://",
        "s3://bucket",
        "s3://bucket/",
        "s3:///prefix",
        "s3://Bucket/prefix",
        "s3://the-key-id:the-secret@bucket/prefix",
        "s3://bucket/../other",
        "s3://bucket/a//b",
        "s3://bucket/" + "a" * 101,
    ],
)
def test_a_bad_address_is_bad_input_and_not_repeated(address, tmp_path):
    with pytest.raises(BadInput, match="RESTITCH_STORE") as raised:
        Home(tmp_path, address).open_store()
    assert not any(secret in str(raised.value) for secret in SECRETS)


def test_a_good_address_is_a_bucket_and_a_prefix():
    assert parse_address("s3://bucket/prefix") == ("bucket", "prefix")
    assert parse_address("s3://my.bucket-1/a/b/") == ("my.bucket-1", "a/b")


def test_a_client_belongs_to_one_process_and_one_environment(s3_account, monkeypatch):
    first = s3_client.client()
    assert s3_client.client() is first
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    second = s3_client.client()
    assert second is not first
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert s3_client.client() is not second


class TestPersistence:
    @pytest.fixture(autouse=True)
    def _no_waiting(self, monkeypatch):
        monkeypatch.setattr(retries, "pause", lambda _seconds: None)

    def calls(self, *failures: Exception):
        """A call that fails so, one time after the other, and then does not."""
        left = list(failures)

        def call() -> str:
            if left:
                raise left.pop(0)
            return "done"

        return call

    def test_content_altered_once_among_other_failures_is_fetched_again(self):
        cut, altered = s3_client.MangledError("cut"), s3_client.AlteredError("altered")
        assert retries.with_retries(self.calls(cut, cut, cut, altered, cut, altered)) == "done"

    def test_content_altered_at_every_attempt_is_damaged_at_the_server(self):
        altered = [s3_client.AlteredError(str(number)) for number in range(5)]
        with pytest.raises(s3_client.AlteredError, match="3"):
            retries.with_retries(self.calls(*altered))
