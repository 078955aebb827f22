"""Every delivery to the webhook receiver is answered, and only MLflow's become events."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings

from restitch.deployments import webhook
from restitch.deployments.webhook import application, handle, sign
from tests.stress.hostile_texts import SECRET, Delivery, check_delivery, deliveries


@settings(max_examples=200)
@given(deliveries())
def test_any_delivery_is_answered_and_only_signed_ones_become_events(given: Delivery) -> None:
    check_delivery(given)


@pytest.mark.parametrize(
    "data",
    [
        {"name": "demo.colour", "version": "3", "tags": 7},  # was a TypeError
        {"name": "demo.colour", "version": "3", "tags": "restitch.version"},
        {"name": "demo.colour", "version": "9" * 5000},
        {"name": "demo.colour", "version": str(1 << 64)},
    ],
)
def test_impossible_messages_are_refused(data: object) -> None:
    body = json.dumps({"entity": "model_version", "action": "created", "data": data}).encode()
    headers = {
        "X-MLflow-Delivery-Id": "d",
        "X-MLflow-Timestamp": "17",
        "X-MLflow-Signature": sign(SECRET, "d", "17", body),
    }
    status, _ = handle(headers, body, secret=SECRET, now=17.0, emit=print, remembered={})
    assert status == 400


def test_a_body_that_never_ends_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "BODY_SECONDS", 0.05)
    sent: list[dict[str, Any]] = []
    parts = iter([{"type": "http.request", "body": b"{", "more_body": True}])

    async def receive() -> dict[str, Any]:
        for part in parts:
            return part
        return await asyncio.Future()  # the rest never comes

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        **{"type": "http", "method": "POST", "path": "/webhook", "headers": []},
        **{"query_string": b"", "http_version": "1.1", "root_path": "", "scheme": "http"},
    }
    events: list[Any] = []
    asyncio.run(application(SECRET, events.append)(scope, receive, send))
    assert sent[0]["status"] == 408
    assert events == []
