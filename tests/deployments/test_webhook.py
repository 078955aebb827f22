"""MLflow's webhooks: only what is signed and new becomes an event, once, and nothing is lost."""

import base64
import hashlib
import hmac
import json
import logging
import queue
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from restitch.deployments.webhook import (
    MAX_BYTES,
    NAME,
    Event,
    handle,
    register_webhook,
    serve,
    sign,
)
from restitch.merging.errors import BadInput, Unavailable
from restitch.tasks.runtime.prefect_api import PrefectApi
from tests.servers import free_port, mlflow_server
from tests.shell import Shell

SECRET = "a secret of some length"
NOW = 1_700_000_000.0
DELIVERY = "0b0e3b7e-7c5f-4a55-9b8e-3f6d1f2a9c11"
MESSAGE = {
    "entity": "model_version",
    "action": "created",
    "timestamp": "2023-11-14T22:13:20+00:00",
    "data": {
        "name": "demo.colour",
        "version": "3",
        "source": "s3://bucket/model",
        "run_id": None,
        "tags": {"team": "vision"},
        "description": None,
    },
}


def about(**data: Any) -> dict[str, Any]:
    usual: Any = MESSAGE["data"]
    return {**MESSAGE, "data": {**usual, **data}}


@dataclass
class Receiver:
    """The receiver with a Prefect that remembers what it was given, or is away."""

    events: list[Event] = field(default_factory=list)
    remembered: dict[str, float] = field(default_factory=dict)
    away: bool = False

    def emit(self, event: Event) -> None:
        if self.away:
            raise Unavailable("Prefect is away")
        self.events.append(event)

    def __call__(
        self,
        message: Any = None,
        *,
        delivery: str = DELIVERY,
        secret: str = SECRET,
        sent: str = str(int(NOW)),
        now: float = NOW,
        tamper: bytes = b"",
        without: str = "",
    ) -> int:
        body = json.dumps(MESSAGE if message is None else message).encode()
        headers = {
            "X-MLflow-Delivery-Id": delivery,
            "X-MLflow-Timestamp": sent,
            "X-MLflow-Signature": sign(secret, delivery, sent, body),
        }
        headers.pop(without, None)
        return handle(
            headers,
            body + tamper,
            secret=SECRET,
            now=now,
            emit=self.emit,
            remembered=self.remembered,
        )[0]


@pytest.fixture
def receiver() -> Receiver:
    return Receiver()


def test_a_new_version_becomes_an_event(receiver: Receiver) -> None:
    assert receiver() == 200
    assert receiver.events == [
        {
            "id": DELIVERY,
            "occurred": "2023-11-14T22:13:20+00:00",
            "event": "restitch.model.registered",
            "resource": {"prefect.resource.id": "restitch.model.demo.colour"},
            "payload": {"line": "demo", "task": "colour", "version": None, "mlflow_version": 3},
        }
    ]


def test_the_signature_is_the_one_that_mlflow_documents() -> None:
    mac = hmac.new(SECRET.encode(), b"some id.17.{}", hashlib.sha256).digest()
    assert sign(SECRET, "some id", "17", b"{}") == "v1," + base64.b64encode(mac).decode()


def test_a_delivery_id_that_is_not_a_uuid_always_gives_the_same_one() -> None:
    found = set()
    for _ in range(2):
        receiver = Receiver()
        assert receiver(delivery="delivery 7") == 200
        found.add(str(uuid.UUID(receiver.events[0]["id"])))
    assert len(found) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"tamper": b" "},
        {"secret": "another secret of some length"},
        {"secret": ""},
        {"now": NOW + 301},
        {"now": NOW - 61},
    ],
    ids=["tampered", "wrong secret", "no secret", "old", "from the future"],
)
def test_a_wrong_or_old_signature_is_refused(receiver: Receiver, wrong: dict[str, Any]) -> None:
    assert receiver(**wrong) == 401
    assert receiver.events == []


def test_every_attempt_of_mlflow_is_accepted_with_the_first_timestamp(receiver: Receiver) -> None:
    receiver.away = True
    for later in (0.0, 0.1, 2.4, 6.9):
        assert receiver(now=NOW + later) == 502
    receiver.away = False
    assert receiver(now=NOW + 10) == 200
    assert len(receiver.events) == 1


def test_a_delivery_counts_once(receiver: Receiver) -> None:
    assert [receiver(now=NOW + later) for later in (0, 1, 299)] == [200, 200, 200]
    assert len(receiver.events) == 1
    assert receiver(delivery=str(uuid.uuid4())) == 200
    assert len(receiver.events) == 2


def test_an_accepted_delivery_is_forgotten_once_it_is_too_old_to_be_repeated(
    receiver: Receiver,
) -> None:
    receiver()
    later = str(int(NOW) + 700)
    assert receiver(delivery=str(uuid.uuid4()), sent=later, now=NOW + 700) == 200
    assert DELIVERY not in receiver.remembered
    assert receiver(now=NOW + 700) == 401


@pytest.mark.parametrize(
    "message",
    [
        {**MESSAGE, "entity": "registered_model"},
        {**MESSAGE, "entity": "model_version_tag", "action": "set"},
        about(name="demo"),
        about(name="Some Model"),
        about(name="demo.a.b"),
        about(tags={"restitch.version": "3"}),
    ],
    ids=["a model", "a tag", "a merged version", "no line", "no task", "our own image"],
)
def test_messages_about_other_things_are_ignored(
    receiver: Receiver, message: dict[str, Any]
) -> None:
    assert receiver(message) == 200
    assert receiver.events == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"without": "X-MLflow-Signature"},
        {"without": "X-MLflow-Timestamp"},
        {"without": "X-MLflow-Delivery-Id"},
        {"sent": "yesterday"},
        {"sent": "9" * 400},
        {"message": []},
        {"message": {"entity": "model_version", "action": "created"}},
        {"message": about(version="newest")},
    ],
    ids=repr,
)
def test_a_malformed_delivery_is_refused(receiver: Receiver, wrong: dict[str, Any]) -> None:
    assert receiver(**wrong) == 400
    assert receiver.events == []


def test_a_body_that_is_not_json_is_refused(receiver: Receiver) -> None:
    for body in (b"", b"\xff", b"{", b"[" * 100_000):
        sent = str(int(NOW))
        headers = {
            "x-mlflow-delivery-id": "1",
            "x-mlflow-timestamp": sent,
            "x-mlflow-signature": sign(SECRET, "1", sent, body),
        }
        found = handle(headers, body, secret=SECRET, now=NOW, emit=receiver.emit, remembered={})
        assert found[0] == 400


def test_a_body_that_is_too_large_is_refused_unread(receiver: Receiver) -> None:
    assert receiver(tamper=b" " * MAX_BYTES) == 413


def test_a_delivery_fails_if_prefect_is_away_or_refuses() -> None:
    with pytest.raises(Unavailable) as raised:
        PrefectApi("http://ann:password@127.0.0.1:9/api").emit([{}])
    assert "password" not in str(raised.value)


def test_no_message_contains_the_secret(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    receiver.away = True
    receiver()
    receiver(secret="another secret of some length")
    with pytest.raises(BadInput) as raised:
        serve(secret="a-guess", prefect_api_url="http://127.0.0.1:9/api")
    assert "a-guess" not in str(raised.value)
    assert "secret of some length" not in caplog.text


def test_a_port_in_use_is_named() -> None:
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as other,
        pytest.raises(Unavailable, match="cannot listen"),
    ):
        serve(port=other.server_port, secret=SECRET, prefect_api_url="http://127.0.0.1:9/api")


def test_only_an_mlflow_server_has_webhooks(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="sends no webhooks"):
        register_webhook(f"sqlite:///{tmp_path}/mlflow.db", "http://127.0.0.1:9/webhook", SECRET)


def test_the_command_names_its_missing_settings(shell: Shell) -> None:
    assert "PREFECT_API_URL" in shell("webhook", code=6).err
    with_prefect = Shell(shell.home, {"PREFECT_API_URL": "http://127.0.0.1:9/api"})
    assert "RESTITCH_WEBHOOK_SECRET" in with_prefect("webhook", code=3).err
    assert "loopback" in shell("webhook", "--help").out


class Events:
    """The part of a Prefect server that takes events: it refuses the first few."""

    def __init__(self, refuse: int) -> None:
        self.taken: queue.Queue[dict[str, Any]] = queue.Queue()
        self.refused = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                refuses = outer.refused < refuse
                outer.refused += refuses
                if not refuses:
                    assert self.path == "/api/events"
                    (event,) = body
                    outer.taken.put(event)
                self.send_response(503 if refuses else 204)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/api"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def events() -> Iterator[Events]:
    server = Events(refuse=1)
    yield server
    server.close()


@pytest.fixture
def address(events: Events, shell: Shell) -> Iterator[str]:
    """A receiver as people start it."""
    variables = {"PREFECT_API_URL": events.url, "RESTITCH_WEBHOOK_SECRET": SECRET}
    process = Shell(shell.home, variables).start("webhook", "--port", "0")
    with process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
        process.terminate()
        _, told = process.communicate(timeout=30)
    assert SECRET not in told


@pytest.mark.servers
def test_a_version_made_by_any_client_of_a_server_becomes_an_event(
    tmp_path: Path, shell: Shell, events: Events, address: str
) -> None:
    from mlflow import MlflowClient

    with urllib.request.urlopen(address.replace("/webhook", "/health"), timeout=10) as answer:
        assert answer.status == 200
    for body in (b"{}", b" " * (MAX_BYTES + 1)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(address, body, timeout=10)
        assert refused.value.code == (413 if len(body) > MAX_BYTES else 400)
    with mlflow_server(tmp_path / "mlflow") as url, shell.inside():
        assert register_webhook(url, f"http://127.0.0.1:{free_port()}/webhook", SECRET) == "created"
        assert register_webhook(url, address, SECRET) == "repaired"
        assert register_webhook(url, address, SECRET) == "unchanged"
        client = MlflowClient(url, url)
        (hook,) = client.list_webhooks()
        assert (hook.name, hook.url) == (NAME, address)
        client.update_webhook(hook.webhook_id, status="DISABLED")
        assert register_webhook(url, address, SECRET) == "repaired"
        with pytest.raises(BadInput, match="refuses the webhook"):
            register_webhook(url, "ftp://127.0.0.1/webhook", SECRET)
        assert client.test_webhook(hook.webhook_id).success
        for name in ("other", "demo.colour"):
            client.create_registered_model(name)
            client.create_model_version(name, "s3://bucket/model", await_creation_for=0)
        event = events.taken.get(timeout=60)
    assert event["payload"] == {
        **{"line": "demo", "task": "colour"},
        **{"version": None, "mlflow_version": 1},
    }
    assert events.refused == 1, "MLflow tried again"
    assert events.taken.empty()
