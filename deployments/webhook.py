"""The receiver of MLflow's webhooks: a new version there becomes an event in Prefect.

MLflow signs its deliveries and repeats them for a few seconds after a server error; so the answer
is 502 as long as Prefect has not taken the event. A delivery counts once: its id becomes the
event's id, and a repeated one is only acknowledged. The signature is checked before the body is
read, and no message contains the secret. The schedule finds the models of lost deliveries, and
those of clients that write to MLflow's database directly.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from restitch.merging.errors import BadInput, Unavailable
from restitch.registry.home import Home
from restitch.registry.mlflow.connection import connect, mlflow_explained
from restitch.registry.mlflow.external_models import task_of
from restitch.registry.mlflow.projection import VERSION_TAG
from restitch.registry.redaction import without_credentials
from restitch.tasks.runtime.events import MODEL_REGISTERED
from restitch.tasks.runtime.prefect_api import PrefectApi

if TYPE_CHECKING:
    from starlette.applications import Starlette

PORT = 4280
SECRET_VARIABLE = "RESTITCH_WEBHOOK_SECRET"
NAME = "restitch"  # of the webhook in MLflow

MAX_BYTES = 1 << 20
BODY_SECONDS = 20.0  # MLflow sends a body at once
MAX_AGE_SECONDS = 300.0  # MLflow's last attempt comes about ten seconds after the first
MAX_SKEW_SECONDS = 60.0  # between the clocks of two hosts
MAX_CONNECTIONS = 100  # at a time; MLflow repeats a refused delivery
MEMORY_SECONDS = 600.0  # longer than the greatest age, so that no delivery counts twice

Event = dict[str, Any]
Answer = tuple[int, str]

log = logging.getLogger("restitch")


def handle(
    headers: Mapping[str, str],
    body: bytes,
    *,
    secret: str,
    now: float,
    emit: Callable[[Event], None],
    remembered: dict[str, float],
) -> Answer:
    """Answer one delivery.

    Args:
        headers: of the request.
        body: its raw bytes, which the signature covers.
        secret: shared with MLflow.
        now: seconds since 1970.
        emit: sends an event to Prefect, or raises `Unavailable`.
        remembered: the accepted deliveries with their time; changed in place.

    Returns:
        The status and a line of text.
    """
    if len(body) > MAX_BYTES:
        return 413, f"more than {MAX_BYTES} bytes"
    by_name = {name.lower(): value for name, value in headers.items()}
    delivery = by_name.get("x-mlflow-delivery-id")
    sent = by_name.get("x-mlflow-timestamp")
    signature = by_name.get("x-mlflow-signature")
    if not delivery or not sent or not signature:
        return 400, "not a signed delivery of MLflow"
    if not (sent.isascii() and sent.isdigit() and len(sent) <= 12):
        return 400, "the timestamp is not a number"
    expected = sign(secret, delivery, sent, body)
    if not hmac.compare_digest(expected.encode(), signature.encode()):
        return 401, "wrong signature"
    if not now - MAX_AGE_SECONDS <= int(sent) <= now + MAX_SKEW_SECONDS:
        return 401, "too old, or from the future"
    for known in [known for known, when in remembered.items() if when < now - MEMORY_SECONDS]:
        remembered.pop(known, None)
    if delivery in remembered:
        return 200, "accepted before"
    try:
        event = event_of(json.loads(body), delivery, int(sent))
    except (ValueError, RecursionError) as error:
        return 400, str(error)[:200] or "not JSON"
    if event is None:
        return 200, "ignored"
    try:
        emit(event)
    except Unavailable as error:
        log.warning("%s: %s", delivery, error.message())
        return 502, "Prefect did not take the event"
    remembered[delivery] = now
    return 200, "accepted"


def sign(secret: str, delivery: str, sent: str, body: bytes) -> str:
    """The signature that MLflow gives a delivery."""
    signed = f"{delivery}.{sent}.".encode() + body
    mac = hmac.new(secret.encode(), signed, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(mac).decode()}"


def event_of(message: Any, delivery: str, sent: int) -> Event | None:
    """The event of a delivery; None if it is not about a new model of a line.

    Raises:
        ValueError: it is not a message of MLflow.
    """
    if not isinstance(message, dict) or not isinstance(message.get("data"), dict):
        raise ValueError("not a message of MLflow")  # noqa: TRY004
    data = message["data"]
    if (message.get("entity"), message.get("action")) != ("model_version", "created"):
        return None
    named, tags = task_of(str(data.get("name"))), data.get("tags") or {}
    if not isinstance(tags, dict):
        raise ValueError("the tags are not a mapping")  # noqa: TRY004
    if named is None or VERSION_TAG in tags:
        return None  # of another kind, or our own projection
    number = str(data.get("version"))
    if not (number.isascii() and number.isdigit() and len(number) <= 12):
        raise ValueError("the version is not a number")
    line, task = named
    return {
        "id": _event_id(delivery),
        "occurred": datetime.fromtimestamp(sent, UTC).isoformat(),
        "event": MODEL_REGISTERED,
        "resource": {"prefect.resource.id": f"restitch.model.{line}.{task}"},
        "payload": {"line": line, "task": task, "version": None, "mlflow_version": int(number)},
    }


def _event_id(delivery: str) -> str:
    try:
        return str(uuid.UUID(delivery))
    except ValueError:
        return str(uuid.uuid5(uuid.NAMESPACE_URL, f"restitch:{delivery}"))


def application(secret: str, emit: Callable[[Event], None]) -> "Starlette":
    """The receiver: `POST /webhook` and `GET /health`."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    remembered: dict[str, float] = {}

    async def webhook(request: Request) -> PlainTextResponse:
        body = b""
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > MAX_BYTES:  # the answer needs no more of it
                        break
        except TimeoutError:
            return PlainTextResponse("the body took too long", 408)
        status, text = await run_in_threadpool(
            handle,
            request.headers,
            body,
            secret=secret,
            now=time.time(),
            emit=emit,
            remembered=remembered,
        )
        log.log(logging.INFO if status == 200 else logging.WARNING, "%s %s", status, text)
        return PlainTextResponse(text, status)

    async def health(_: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    return Starlette(
        routes=[
            Route("/webhook", webhook, methods=["POST"]),
            Route("/health", health, methods=["GET"]),
        ]
    )


def serve(
    host: str = "127.0.0.1",
    port: int = PORT,
    *,
    secret: str,
    prefect_api_url: str,
    started: Callable[[str], None] = log.info,
) -> None:
    """Receive until the process is stopped.

    Args:
        host: the address to listen on; by default other machines cannot reach it.
        port: 0 takes a free one.
        secret: shared with MLflow.
        prefect_api_url: the server that gets the events.
        started: receives the address.

    Raises:
        BadInput: there is no secret.
        Unavailable: the port is taken.
    """
    import uvicorn

    check_secret(secret)
    try:
        listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
    except OSError as error:
        raise Unavailable(
            f"cannot listen on {host} port {port}",
            found=error.strerror or str(error),
            hint="stop the program that listens there, or choose another --port",
        ) from error
    with listener:
        number = listener.getsockname()[1]
        started(f"http://{f'[{host}]' if ':' in host else host}:{number}/webhook")
        config = uvicorn.Config(
            application(secret, lambda event: PrefectApi(prefect_api_url).emit([event])),
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            lifespan="off",
        )
        uvicorn.Server(config).run(sockets=[listener])


def check_secret(secret: str) -> str:
    """Return the secret.

    Raises:
        BadInput: it is missing, or short enough to be guessed.
    """
    if len(secret) < 16:
        raise BadInput(
            f"{SECRET_VARIABLE} is missing or too short",
            expected="16 characters or more, the same as in MLflow's webhook",
            found=f"{len(secret)} characters",
            hint="make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'",
        )
    return secret


def register_webhook(
    mlflow_uri: str, url: str, secret: str
) -> Literal["created", "repaired", "unchanged"]:
    """Make an MLflow server send new model versions to a receiver; may run again.

    MLflow never shows a secret, so this sets it each time.

    Raises:
        BadInput: this MLflow has no webhooks, or refuses the address.
        Unavailable: the server cannot be used.
    """
    if not mlflow_uri.startswith(("http://", "https://")):
        raise BadInput(
            f"MLflow at {without_credentials(mlflow_uri)} sends no webhooks",
            expected="the http address of an MLflow server",
            hint="without a server, the schedule finds new models",
        )
    from mlflow.exceptions import MlflowException

    home = replace(Home.from_environment(), tracking_uri=mlflow_uri)
    with mlflow_explained(home):
        client = connect(home)
        try:
            return _registered(client, url, check_secret(secret))
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            raise BadInput(
                f"MLflow refuses the webhook {without_credentials(url)}",
                found=without_credentials(str(error).splitlines()[0])[:300],
                hint="on loopback its server needs MLFLOW_WEBHOOK_ALLOWED_SCHEMES=http,https and "
                "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS=true",
            ) from None


def _registered(client: Any, url: str, secret: str) -> Literal["created", "repaired", "unchanged"]:
    event = "model_version.created"
    ours = [hook for hook in _webhooks(client) if hook.name == NAME]
    if not ours:
        client.create_webhook(
            NAME, url, [event], "Sends new model versions to restitch.", secret, "ACTIVE"
        )
        return "created"
    first, *others = sorted(ours, key=lambda hook: (hook.creation_timestamp, hook.webhook_id))
    for other in others:  # two hosts made one at the same moment
        client.delete_webhook(other.webhook_id)
    events = [f"{one.entity.value}.{one.action.value}" for one in first.events]
    same = (first.url, events, str(first.status)) == (url, [event], "ACTIVE")
    client.update_webhook(first.webhook_id, url=url, events=[event], secret=secret, status="ACTIVE")
    return "unchanged" if same and not others else "repaired"


def _webhooks(client: Any) -> list[Any]:
    webhooks, token = [], None
    while True:
        page = client.list_webhooks(max_results=100, page_token=token)
        webhooks.extend(page)
        token = page.token
        if not token:
            return webhooks
