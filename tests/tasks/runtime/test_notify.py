"""People are notified of acts that counted, in plain English; a failure is only a warning."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from restitch.merging.errors import BadInput
from restitch.registry.ledger.ledger import Act, Ledger
from restitch.registry.ledger.line_state import LineState
from restitch.registry.redaction import notify_addresses, without_credentials
from restitch.registry.specs.files import parse_line
from restitch.registry.store.folder import FolderStore
from restitch.registry.store.objects import ObjectStore
from restitch.tasks.runtime import delivery
from restitch.tasks.runtime.console import Reporter, reporting_to
from restitch.tasks.runtime.notify import notify, notify_line
from tests.fake_prefect import FakePrefect, fake_prefect
from tests.notify_server import NotifyServer, notify_server
from tests.registry.builders import done, line_spec, merge, model, model_ref, ready, with_task

ALL = ("promoted", "rejected", "held", "quarantined", "rolled-back", "drop", "crashes")


class Warnings(Reporter):
    """A reporter that keeps warnings."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def warn(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    reporter = Warnings()
    with reporting_to(reporter):
        yield reporter.texts


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[NotifyServer]:
    with notify_server() as found:
        monkeypatch.setenv("RESTITCH_NOTIFY_URLS", f"json://{found.host}/hook")
        yield found


def line(folder: Path, *events: str) -> Ledger:
    made = Ledger(ObjectStore(FolderStore(folder)), "photos")
    made.create(line_spec("photos", notify=events), model_ref("base"), "ann", "new")
    return made


def unchanged(line_state: LineState) -> LineState:
    return line_state


def quarantine(ledger: Ledger, reason: str) -> Act | None:
    ledger.act("registered", "ann", "", lambda now: with_task(now, "number", model()))
    return ledger.act(
        "quarantined",
        "worker",
        "number 1: it has other tensors",
        lambda now: now.with_state("number", 1, "quarantined", reason),
    )


def test_a_message_names_line_version_values_and_the_command_to_look_further(
    tmp_path: Path, server: NotifyServer, warnings: list[str]
) -> None:
    ledger = line(tmp_path, *ALL)
    merge(ledger)
    why = "version 1: min_retention of the general benchmark: 0.8690 < 0.9"
    act = done(ledger.act("rejected", "ann", why, unchanged))
    notify(act)
    (message,) = server.messages
    assert message["title"] == "photos: rejected version 1: min_retention 0.8690 < 0.9"
    assert message["type"] == "warning"
    assert message["message"].splitlines() == [
        "Version 1 of line photos is rejected: it failed its gates.",
        why,
        f"By ann at {act.entry.time[:19].replace('T', ' ')} UTC, act 4 of the line.",
        "To look further: restitch show photos 1",
    ]
    assert warnings == []


def test_a_promotion_with_a_drop_is_one_message(tmp_path: Path, server: NotifyServer) -> None:
    ledger = line(tmp_path, "promoted", "drop")
    merge(ledger)
    act = ledger.act("promoted", "ann", "version 1: no gates", lambda now: now.promoted(1))
    notify(act, {"drop": "colour lost 0.034 of its accuracy"})
    (message,) = server.messages
    assert message["type"] == "warning", "good news with a drop are no good news"
    assert "Version 1 of line photos is the champion." in message["message"]
    assert "colour lost 0.034 of its accuracy" in message["message"]


def test_a_quarantine_tells_the_whole_reason(tmp_path: Path, server: NotifyServer) -> None:
    ledger = line(tmp_path, "quarantined")
    reason = "it has other tensors\n  expected: 12\n  found:    11"
    notify(quarantine(ledger, reason), {"crashes": "3 processes died at it."})
    (message,) = server.messages
    assert message["title"] == "photos: quarantined number 1: it has other tensors"
    assert message["type"] == "failure"
    assert reason in message["message"]
    assert "3 processes died at it." in message["message"]
    assert message["message"].endswith("To look further: restitch status photos")


@pytest.mark.parametrize("asked", [(), ("promoted", "held"), ("drop",)])
def test_only_what_a_line_asks_for_is_sent(
    tmp_path: Path, server: NotifyServer, asked: tuple[str, ...]
) -> None:
    ledger = line(tmp_path, *asked)
    merge(ledger)
    notify(ledger.act("rejected", "ann", "version 1: too little", unchanged))
    notify(ledger.act("pinned", "ann", "", lambda now: now.with_pin(True)))
    notify(None)
    assert server.messages == []


def test_an_act_that_did_not_count_is_not_sent(tmp_path: Path, server: NotifyServer) -> None:
    ledger = line(tmp_path, *ALL)
    for _ in range(2):
        notify(
            ledger.act("promoted", "a", "v", lambda now: None if now.pinned else now.with_pin(True))
        )
    assert len(server.messages) == 1


def test_every_address_gets_the_message(
    tmp_path: Path, server: NotifyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "RESTITCH_NOTIFY_URLS", f"json://{server.host}/a,\n json://{server.host}/b?c=d,e"
    )
    act = quarantine(line(tmp_path, "quarantined"), "NaN")
    notify(act)
    assert sorted(path.partition("?")[0] for path in server.paths) == ["/a", "/b"]


BROKEN = {
    "unset": ("", "RESTITCH_NOTIFY_URLS is not set in this process"),
    "away": ("json://user:pl4nted@127.0.0.1:1/T0K3N-1", "(json): A Connection error occurred"),
    "nonsense": ("pl4nted-T0K3N", "apprise does not know address 1 of 1"),
    "unknown scheme": ("pl4nted://T0K3N-2", "apprise does not know address 1 of 1"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_message_that_cannot_be_sent_is_a_warning_without_the_address(
    tmp_path: Path,
    warnings: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    case: str,
) -> None:
    address, found = BROKEN[case]
    monkeypatch.setenv("RESTITCH_NOTIFY_URLS", address)
    with caplog.at_level("DEBUG"):
        notify(quarantine(line(tmp_path, "quarantined"), "NaN"))
    (warning,) = warnings
    assert warning.startswith("photos: a notification was not sent: ")
    assert found in warning
    shown = "".join([*warnings, *capfd.readouterr(), caplog.text])
    assert "pl4nted" not in shown
    assert "T0K3N" not in shown


@pytest.mark.parametrize("status", [401, 404, 500])
def test_a_service_that_refuses_is_a_warning_with_its_status(
    tmp_path: Path, server: NotifyServer, warnings: list[str], status: int
) -> None:
    server.status = status
    notify(quarantine(line(tmp_path, "quarantined"), "NaN"))
    (warning,) = warnings
    assert f"error={status}" in warning
    assert "address 1 of 1 in RESTITCH_NOTIFY_URLS (json)" in warning


def test_a_service_that_trickles_its_answer_delays_no_longer_than_the_limit(
    tmp_path: Path,
    server: NotifyServer,
    warnings: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.delay = 0.5
    monkeypatch.setattr(delivery, "PATIENCE_SECONDS", 1.0)
    act = quarantine(line(tmp_path, "quarantined"), "NaN")
    delivery.services()  # imports apprise
    began = time.monotonic()
    notify(act)
    assert time.monotonic() - began < 3
    assert warnings == [
        "photos: a notification was not sent: address 1 of 1 in RESTITCH_NOTIFY_URLS (json): "
        "no answer within 1 seconds"
    ]


def test_a_reason_calls_nobody_and_has_no_control_characters(
    tmp_path: Path, server: NotifyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_pl4nted")
    reason = "@everyone look: tensor <!channel>\x1b[31m <@U1> hf_pl4nted by ann@example.org"
    notify(quarantine(line(tmp_path, "quarantined"), reason))
    (message,) = server.messages
    for call in ("@everyone", "<!", "<@", "\x1b", "hf_pl4nted"):
        assert call not in message["message"]
    assert "ann@example.org" in message["message"]


def test_a_long_reason_is_cut(tmp_path: Path, server: NotifyServer) -> None:
    notify(quarantine(line(tmp_path, "quarantined"), "x" * 50_000))
    (message,) = server.messages
    assert len(message["message"]) < 2000
    assert message["message"].endswith("To look further: restitch status photos")


def test_acts_are_events_on_the_prefect_server_whether_a_line_asks_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = line(tmp_path)
    merge(ledger)
    with fake_prefect() as prefect:
        monkeypatch.setenv("PREFECT_API_URL", prefect.url)
        prefect.knows_deployments()
        act = done(ledger.act("promoted", "ann", "version 1: good", lambda now: now.promoted(1)))
        notify(act, {"drop": "colour lost 0.034"})
        quarantined = done(quarantine(ledger, "NaN"))
        notify(quarantined)
    events = sent(prefect)
    assert [event["event"] for event in events] == [
        "restitch.line.promoted",
        "restitch.line.drop",
        "restitch.line.quarantined",
    ]
    assert {event["resource"]["prefect.resource.id"] for event in events} == {
        "restitch.line.photos"
    }
    assert events[0]["payload"] == {
        "line": "photos",
        "title": "photos: promoted version 1: good",
        "text": events[0]["payload"]["text"],
        "version": 1,
        "task": None,
        "sequence": act.entry.sequence,
        "actor": "ann",
        "reason": "version 1: good",
    }
    assert (events[2]["payload"]["version"], events[2]["payload"]["task"]) == (None, "number")


def sent(prefect: FakePrefect) -> list[dict[str, Any]]:
    return [event for body in prefect.bodies("POST /events") for event in body]


def test_a_message_about_a_line_needs_no_act(tmp_path: Path, server: NotifyServer) -> None:
    state = line(tmp_path, "crashes").state()
    notify_line(state, "photos: remerge crashed 3 times", "text", ("crashes",))
    notify_line(state, "photos: something else", "text", ("held",))
    assert server.titles == ["photos: remerge crashed 3 times"]


@pytest.mark.parametrize("text", ["[promoted, failed]", "promoted", "[all]", "{promoted: true}"])
def test_other_events_are_refused_with_the_known_ones(text: str) -> None:
    file = "line: demo\nbase: org/model\nfamily: clip\nmethod: localize-and-stitch\n"
    with pytest.raises(BadInput, match="notify") as raised:
        parse_line(f"{file}notify: {text}", "line.yaml", Path("/nowhere"))
    if "[" in text:
        assert all(event in str(raised.value) for event in ALL)


def test_the_key_without_a_value_notifies_of_nothing() -> None:
    file = "line: demo\nbase: org/model\nfamily: clip\nmethod: localize-and-stitch\n"
    assert parse_line(f"{file}notify:", "line.yaml", Path("/nowhere")).notify == ()


SECRET = st.from_regex(r"[A-Z][A-Za-z0-9]{3,20}[0-9][A-Za-z0-9]{2,20}", fullmatch=True)


@given(SECRET, st.sampled_from(["u:{}@host", "{}@host", "{}/x", "host/{}", "host/?k={}", "{}:x@h"]))
def test_every_part_of_an_address_is_redacted(secret: str, form: str) -> None:
    environment = {"RESTITCH_NOTIFY_URLS": f"slack://{form.format(secret)}"}
    assert secret not in without_credentials(f"POST /a/{secret}?x failed", environment)


def test_plain_words_and_hosts_of_an_address_are_not_redacted() -> None:
    environment = {"RESTITCH_NOTIFY_URLS": "json://hooks.example.org:8080/restitch/photos"}
    text = "restitch status photos at http://hooks.example.org, localhost, 127.0.0.1"
    assert without_credentials(text, environment) == text


def test_addresses_are_separated_by_space_or_commas() -> None:
    text = " json://a/b?to=x,y , slack://A/B/C\n\tmailto://u:p@h "
    found = notify_addresses({"RESTITCH_NOTIFY_URLS": text})
    assert found == ("json://a/b?to=x,y", "slack://A/B/C", "mailto://u:p@h")
    assert notify_addresses({}) == notify_addresses({"RESTITCH_NOTIFY_URLS": " "}) == ()


def test_nothing_is_imported_without_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "services", lambda: pytest.fail("nobody asked"))
    assert "RESTITCH_NOTIFY_URLS" not in os.environ
    notify(quarantine(line(tmp_path), "NaN"))


def test_a_held_model_points_to_the_status(tmp_path: Path, server: NotifyServer) -> None:
    ledger = line(tmp_path, "held")
    ledger.act("registered", "ann", "", lambda now: with_task(now, "wreck", ready()))
    act = ledger.act(
        "held",
        "ann",
        "wreck 1: max_task_drop of a: 0.1 > 0.01",
        lambda now: now.with_state("wreck", 1, "held", "why"),
    )
    notify(act)
    (message,) = server.messages
    assert message["title"] == "photos: held wreck 1: max_task_drop of a: 0.1 > 0.01"
    assert message["message"].startswith("Model wreck 1 of line photos is held: ")
    assert message["message"].endswith("To look further: restitch status photos")
