"""Hostile line and task files and webhook deliveries for the fuzzer, and the checks of them.

A text is a valid file into which values, keys, single characters or unusual YAML constructs are
inserted. A check returns the outcome. It raises if a reader fails without an explained error, or
if a file does not mean the same when it is written and read again.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from restitch.deployments.webhook import MAX_BYTES, Event, handle, sign
from restitch.merging.errors import BadInput
from restitch.registry.specs.files import load_line, load_task
from restitch.registry.specs.line import LineSpec
from restitch.registry.specs.name import NAME
from restitch.registry.specs.task import TaskSpec
from tests.stress.hostile_files import JUNK, damaged_bytes

LINE: dict[str, Any] = {
    "line": "demo",
    "base": "org/base",
    "family": "text",
    "method": {"name": "stitch", "settings": {"overlap": "mean"}},
    "localize": {"mode": "dataless", "density": 0.05, "include": ["encoder.*"]},
    "gates": {"min_retention": 0.9, "max_patch_bytes": "500MB", "warn": ["min_retention"]},
    "retention": {"task": "general", "head": {"labels": ["a", "b"]}, "data": {"path": "org/set"}},
    "schedule": "*/15 * * * *",
}
TASK: dict[str, Any] = {
    "task": "colour",
    "data": {"path": "folder", "train": "train.csv", "sample": {"rows": 3}, "input": "text"},
    "head": {"labels": "labels.txt", "templates": ["a {}"]},
    "scale": 1e1,
    "max_length": 77,
}

# Texts that are not valid paths, names or numbers.
_TEXTS = st.sampled_from(
    [
        *("", ".", "..", "~", "~nobody-at-all/x", "a\0b", "a\nb", "/etc/shadow", "../../x", "//"),
        *("n" * 300, "a/" * 3000, "\ud800", "pipe", "pipe.json", "loop", "folder", "labels.json"),
        *("models:/a/1", "s3://b/k", "http://[", "file://[", "file:///etc/hosts", "openai", "{}"),
        *("org/name@" + "0" * 40, "org/name:x@y", "1e400", "9" * 5000, "500XB", "-1MB", "\u2028"),
    ]
)
_ANY: st.SearchStrategy[Any] = st.one_of(
    JUNK, _TEXTS, st.lists(_TEXTS, max_size=2), st.builds(dict, a=JUNK)
)
_YAML = st.sampled_from(
    [
        *("&a [*a]", "*a", "&a b", "<<: *a", "? [a]\n: b", "!!python/object/apply:os.system [id]"),
        *(
            "!!binary aGk=",
            "!!set {a, b}",
            "!!int '1e3'",
            "2020-01-01",
            "0x" + "f" * 5000,
            "1:9:9",
            "1" + ":1" * 50_000,
        ),
        *(".inf", ".nan", "1e400", "'", '"\\ud800"', '"\\0"', "---", "...", "%TAG ! !", "\t", "|"),
        *("[" * 60, "{a: " * 400, "- " * 200, "? " * 50, "!!float x", "\x00", "\ufeff", "~", "= "),
    ]
)


@st.composite
def _texts(draw: st.DrawFn, good: dict[str, Any]) -> bytes:
    values = json.loads(json.dumps(good))
    how = draw(st.sampled_from(["value", "value", "value", "yaml", "bytes"]))
    if how == "value":
        for _ in range(draw(st.integers(1, 2))):
            place = values
            key = draw(st.sampled_from([*place, "more"]))
            while isinstance(place.get(key), dict) and place[key] and draw(st.integers(0, 3)):
                place = place[key]
                key = draw(st.sampled_from([*place, "more"]))
            place[key] = draw(_TEXTS if draw(st.booleans()) else _ANY)
    text = json.dumps(values) if draw(st.booleans()) else yaml.safe_dump(values)
    if how == "yaml":
        rows = yaml.safe_dump(values).splitlines()
        row = draw(st.integers(0, len(rows) - 1))
        key = rows[row].split(":")[0]
        snippet = draw(_YAML)
        rows[row : row + 1] = draw(
            st.sampled_from([[f"{key}: {snippet}"], [snippet, rows[row]], [rows[row] + snippet]])
        )
        text = "\n".join(rows)
    data = text.encode("utf-8", "surrogatepass")
    return draw(damaged_bytes(data)) if how == "bytes" else data


def lines() -> st.SearchStrategy[bytes]:
    """The bytes of line files."""
    return _texts(LINE)


def tasks() -> st.SearchStrategy[bytes]:
    """The bytes of task files."""
    return _texts(TASK)


@contextmanager
def strange_folder() -> Iterator[Path]:
    """A folder with the targets of the paths in hostile files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "folder").mkdir()
        (folder / "labels.txt").write_text("red\ngreen\n", encoding="utf-8")
        (folder / "labels.json").write_text("[1, {}]", encoding="utf-8")
        os.mkfifo(folder / "pipe")
        os.mkfifo(folder / "pipe.json")
        (folder / "loop").symlink_to("loop")
        yield folder


def check_line(data: bytes) -> str:
    """Check that a line file is refused, or is the same after a round trip."""
    with strange_folder() as folder:
        file = folder / "line.yaml"
        file.write_bytes(data)
        try:
            spec = load_line(file)
        except BadInput as error:
            return _refused(error)
    assert NAME.match(spec.line)
    assert LineSpec.from_json(spec.to_json()) == spec
    assert LineSpec.from_json(spec.to_json()).digest == spec.digest
    return "read"


def check_task(data: bytes) -> str:
    """Check that a task file is refused, or is the same after a round trip."""
    with strange_folder() as folder:
        file = folder / "task.yaml"
        file.write_bytes(data)
        try:
            spec = load_task(file)
        except BadInput as error:
            return _refused(error)
    assert NAME.match(spec.task)
    assert TaskSpec.from_json(spec.to_json()) == spec
    assert TaskSpec.from_json(spec.to_json()).digest == spec.digest
    return "read"


def _refused(error: BadInput) -> str:
    error.message().encode()  # can be shown and stored
    return "BadInput"


SECRET = "a secret of some length"
NOW = 1_700_000_000
_MESSAGE: dict[str, Any] = {
    "entity": "model_version",
    "action": "created",
    "timestamp": "2023-11-14T22:13:20+00:00",
    "data": {"name": "demo.colour", "version": "3", "source": "s3://b/k", "tags": {"a": "b"}},
}
_HEADERS = ("X-MLflow-Delivery-Id", "X-MLflow-Timestamp", "X-MLflow-Signature")
Delivery = tuple[dict[str, str], bytes]


@st.composite
def deliveries(draw: st.DrawFn) -> Delivery:
    """Headers and body of a delivery, with unusual content or a wrong signature."""
    message = json.loads(json.dumps(_MESSAGE))
    for _ in range(draw(st.integers(0, 2))):
        inner = message["data"] if isinstance(message.get("data"), dict) else message
        place = inner if draw(st.integers(0, 3)) else message
        place[draw(st.sampled_from([*place, "more"]))] = draw(st.one_of(_ANY, _NAMED))
    body = json.dumps(message).encode()
    if draw(st.integers(0, 4)) == 0:
        body = draw(damaged_bytes(body))
    delivery = draw(st.sampled_from(["d7", "urn:uuid:", "\xb2" * 32, "{" * 3000, "a b"]))
    sent = draw(st.sampled_from([str(NOW), str(NOW), str(NOW - 301), "\xb2", "9" * 12, "-1", ""]))
    headers = dict(zip(_HEADERS, (delivery, sent, sign(SECRET, delivery, sent, body)), strict=True))
    if draw(st.integers(0, 3)) == 0:
        name = draw(st.sampled_from(_HEADERS))
        headers[name] = draw(st.text(st.characters(max_codepoint=255), max_size=20))
    return headers, body


_NAMED = st.sampled_from(
    ["demo.", ".", "a.b.c", "demo.colour\n", "demo.%", "../x.y", "1" * 5000, "\u0663", " 3", 3, "3"]
)


def check_delivery(given: Delivery) -> str:
    """Check that a delivery is answered, and only becomes an event if MLflow signed it just now."""
    headers, body = given
    events: list[Event] = []
    remembered: dict[str, float] = {}
    status, text = handle(
        headers, body, secret=SECRET, now=float(NOW), emit=events.append, remembered=remembered
    )
    assert status in (200, 400, 401, 413)
    assert SECRET not in text
    assert len(events) == (text == "accepted") <= (status == 200)
    for event in events:
        delivery, sent, signature = (headers[name] for name in _HEADERS)
        assert signature == sign(SECRET, delivery, sent, body)
        assert abs(int(sent) - NOW) <= 300
        assert len(body) <= MAX_BYTES
        payload = event["payload"]
        assert NAME.match(payload["line"])
        assert NAME.match(payload["task"])
        assert 0 <= payload["mlflow_version"] < 1 << 63
        json.dumps(event).encode()
    return f"{status} {text}" if status == 200 else str(status)
