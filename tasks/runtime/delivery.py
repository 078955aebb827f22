"""Delivery of messages to the services whose addresses are in `RESTITCH_NOTIFY_URLS`, by apprise.

All addresses get a message at the same time, and nobody waits longer than `PATIENCE_SECONDS`.
Addresses hold secrets: no log, error or message shows more of them than their scheme.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from restitch.registry.redaction import NOTIFY_VARIABLE, notify_addresses, without_credentials
from restitch.registry.specs.line import NotifyEvent

if TYPE_CHECKING:
    from apprise import Apprise, NotifyType

PATIENCE_SECONDS = 10.0

_GOOD, _BAD = {"promoted", "rolled-back"}, {"quarantined", "crashes"}


@dataclass(frozen=True)
class Message:
    """A message.

    Attributes:
        title: one line.
        text: in plain English.
        events: what happened; services show good and bad news in different colours.
    """

    title: str
    text: str
    events: tuple[NotifyEvent, ...]


@dataclass(frozen=True)
class Service:
    """A service at an address.

    Attributes:
        name: its place among the addresses and, if apprise knows it, its scheme.
        client: apprise's client; None if it does not know the address.
    """

    name: str
    client: "Apprise | None"


def services() -> tuple[Service, ...]:
    """The services in the environment."""
    addresses = notify_addresses(os.environ)
    return tuple(_service(number, len(addresses), a) for number, a in enumerate(addresses, 1))


def problems(services: tuple[Service, ...]) -> tuple[str, ...]:
    """The reasons why services cannot be reached, known before a message is sent."""
    if not services:
        return (f"{NOTIFY_VARIABLE} is not set in this process",)
    return tuple(
        f"apprise does not know {service.name}" for service in services if service.client is None
    )


def deliver(message: Message) -> Iterator[str]:
    """Send a message to all services, and return the problems."""
    found = services()
    yield from problems(found)
    deliveries = [
        _Delivery(service.name, service.client, message)
        for service in found
        if service.client is not None
    ]
    deadline = time.monotonic() + PATIENCE_SECONDS
    for delivery in deliveries:
        delivery.start()
    for delivery in deliveries:
        delivery.join(max(0.0, deadline - time.monotonic()))
        if delivery.is_alive():
            yield f"{delivery.name}: no answer within {PATIENCE_SECONDS:g} seconds"
        elif delivery.problem is not None:
            yield f"{delivery.name}: {delivery.problem}"


class _Delivery(threading.Thread):
    """Sends one message to one service; a process that ends does not wait for it."""

    def __init__(self, name: str, client: "Apprise", message: Message) -> None:
        super().__init__(name=name, daemon=True)
        self.client = client
        self.message = message
        self.problem: str | None = None

    def run(self) -> None:
        """Send the message."""
        from apprise import NotifyFormat

        try:
            sent = self.client.notify(
                title=self.message.title,
                body=self.message.text,
                notify_type=_colour(self.message.events),
                body_format=NotifyFormat.TEXT,
            )
        except Exception as error:  # a plugin may raise anything, and its text quote the address
            self.problem = type(error).__name__
        else:
            complaint = _log().pop(self.name) or "the service refused it"
            self.problem = None if sent else without_credentials(complaint)


def _colour(events: tuple[NotifyEvent, ...]) -> "NotifyType":
    from apprise import NotifyType

    if _BAD.intersection(events):
        return NotifyType.FAILURE
    return NotifyType.SUCCESS if _GOOD.issuperset(events) else NotifyType.WARNING


def _service(number: int, count: int, address: str) -> Service:
    _log()
    from apprise import Apprise, AppriseAsset

    client = Apprise(asset=AppriseAsset(app_id="restitch", app_desc="restitch", async_mode=False))
    name = f"address {number} of {count} in {NOTIFY_VARIABLE}"
    if not client.add(address):
        return Service(name, None)
    return Service(f"{name} ({address.partition('://')[0]})", client)


class _Log(logging.Handler):
    """Keeps the last complaint of each delivery, and prints nothing: it may quote the address."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._complaints: dict[str | None, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a complaint."""
        self._complaints[record.threadName] = record.getMessage()

    def pop(self, delivery: str) -> str | None:
        """The complaint of a delivery, which is forgotten."""
        return self._complaints.pop(delivery, None)


_LOG = _Log()


def _log() -> _Log:
    """Take over apprise's log, and silence the lines in which urllib3 prints addresses."""
    import apprise  # noqa: F401 (it sets its log up when it is imported)

    # Each time: other libraries configure logging for the whole process.
    logger = logging.getLogger("apprise")
    logger.handlers, logger.propagate = [_LOG], False
    logger.setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.WARNING)
    return _LOG
