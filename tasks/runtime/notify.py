"""Notifications about acts of a line: messages to people, and events on the Prefect server.

A line asks for messages with `notify` in its file; `tasks.runtime.delivery` sends them. The
process whose act counted notifies, after the swap and once: if it is killed in between, nobody
does. A notification that cannot be sent is a warning and never a failure.
"""

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any, get_args

from restitch.registry.ledger.ledger import Act
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.outcomes import headline, merges_about, touched_models
from restitch.registry.redaction import without_credentials
from restitch.registry.specs.line import NotifyEvent
from restitch.tasks.runtime.console import warn
from restitch.tasks.runtime.delivery import Message, deliver
from restitch.tasks.runtime.events import announce_act

_EVENTS: tuple[NotifyEvent, ...] = get_args(NotifyEvent)
_LONGEST_TITLE, _LONGEST_REASON = 120, 1500
# What chat services read as a call to everybody; a reason may quote a name in somebody's file.
_MENTION = re.compile(r"@(?=everyone|here|channel|all\b)|<(?=[@!#&])")

_KEPT_OUT = ("held", "quarantined")
_SENTENCES = {
    "promoted": "Version {version} of line {line} is the champion.",
    "rolled-back": "Version {version} of line {line} is the champion again.",
    "rejected": "Version {version} of line {line} is rejected: it failed its gates.",
    "held": "Model {model} of line {line} is held: it takes part in no merge.",
    "quarantined": "Model {model} of line {line} is quarantined: it cannot join the merged model.",
}


def notify(act: Act | None, also: Mapping[NotifyEvent, str] | None = None) -> None:
    """Notify of an act; None did not count, and nobody asks for acts of some kinds.

    Args:
        act: an act of this process.
        also: further events that the act is, each with a sentence about it.
    """
    if act is None or act.entry.kind not in _SENTENCES:
        return
    entry, line, further = act.entry, act.line_state.line, also or {}
    key, version = next(iter(touched_models(entry)), None), _version(act)
    why = act.line_state.model(key).reason if key and entry.kind in _KEPT_OUT else None
    command = f"restitch status {line}" if version is None else f"restitch show {line} {version}"
    lines = [
        _SENTENCES[entry.kind].format(version=version, line=line, model=key),
        *(_shortened(text, _LONGEST_REASON) for text in (why or entry.reason, *further.values())),
        f"By {entry.actor} at {datetime.fromisoformat(entry.time):%Y-%m-%d %H:%M:%S} UTC, "
        f"act {entry.sequence} of the line.",
        f"To look further: {command}",
    ]
    events = tuple(event for event in _EVENTS if event in (entry.kind, *further))
    facts = {
        "version": version,
        "task": key.task if key and version is None else None,
        "sequence": entry.sequence,
        "actor": entry.actor,
        "reason": entry.reason,
    }
    notify_line(act.line_state, f"{line}: {headline(entry)}", "\n".join(lines), events, facts)


def notify_line(
    line_state: LineState,
    title: str,
    text: str,
    events: tuple[NotifyEvent, ...],
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Emit events on the Prefect server, and send a message if the line asks for one of them.

    Args:
        line_state: the line.
        title: one line.
        text: the message in plain English.
        events: what happened, all in one message.
        facts: more values for the events.
    """
    message = Message(_shortened(_plain(title), _LONGEST_TITLE), _plain(text), events)
    for event in events:
        announce_act(
            event, line_state.line, title=message.title, text=message.text, **(facts or {})
        )
    if set(events) & set(line_state.spec.notify):
        for problem in deliver(message):
            warn(f"{line_state.line}: a notification was not sent: {problem}")


def _version(act: Act) -> int | None:
    """The merged version that an act is about."""
    if act.entry.kind in ("promoted", "rolled-back"):
        return act.line_state.champion
    return max(merges_about(act.entry), default=None)


def _plain(text: str) -> str:
    """A text without credentials, control characters and calls to everybody."""
    printable = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
    return _MENTION.sub("\\g<0>\u200b", without_credentials(printable))


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
