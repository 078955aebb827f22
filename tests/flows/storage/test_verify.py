"""A verification finds and names every altered object, and proves that a model is absent."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from restitch.merging.digests import digest_bytes
from restitch.registry.ledger.records import Entry
from tests.cli.test_end_to_end import plain
from tests.conftest import Three
from tests.shell import Shell


@pytest.fixture
def copy(three: Three, tmp_path: Path) -> Shell:
    """A home of its own with three members and their projection in MLflow."""
    shutil.copytree(three.shell.home, tmp_path / "home")
    return Shell(tmp_path / "home")


def write(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def entry_file(shell: Shell, sequence: int) -> Path:
    entry = shell.acts()[sequence - 1]
    return shell.home / "store" / "audit" / entry.digest


def damage(found: Any) -> dict[str, str]:
    return {one["subject"]: one["text"] for one in found["findings"] if one["kind"] == "damage"}


def test_an_untouched_line_is_intact_and_all_its_versions_are_rebuilt(three: Three) -> None:
    before = three.shell.head_bytes()
    found = three.shell.json("verify", "demo")
    assert found["intact"]
    assert found["findings"] == []
    assert (found["versions"], found["rebuilt"]) == ([1, 2, 3], [1, 2, 3])
    assert found["acts"] == len(three.shell.acts())
    assert found["mlflow"]
    output = plain(three.shell("verify", "demo").out)
    assert "intact" in output
    assert "3 of 3 merged versions rebuilt from their recipes, byte for byte" in output
    assert three.shell.head_bytes() == before


def test_one_version_is_verified_alone(three: Three) -> None:
    found = three.shell.json("verify", "demo", "--version", "champion")
    assert (found["versions"], found["rebuilt"]) == ([3], [3])


def test_an_altered_entry_is_found_and_named(copy: Shell) -> None:
    file = entry_file(copy, 4)
    write(file, file.read_bytes().replace(b'"actor":"', b'"actor":"somebody-'))
    found = copy.json("verify", "demo", code=7)
    assert "audit entry 4 was altered" in damage(found)["the audit trail"]
    assert found["acts"] == len(list((copy.home / "store" / "audit").iterdir())) - 4


def test_a_removed_entry_is_found_and_named(copy: Shell) -> None:
    entry_file(copy, 5).unlink()
    found = copy.json("verify", "demo", code=7)
    assert "audit entry 5 is missing" in damage(found)["the audit trail"]


def test_an_inserted_entry_is_found_and_named(copy: Shell) -> None:
    """The entry after it is altered to link to it."""
    acts = copy.acts()
    store = copy.home / "store"
    put_in = acts[3].model_copy(update={"reason": "put in", "previous": acts[3].digest})
    (store / "audit" / put_in.digest).write_bytes(put_in.to_bytes())
    changed = acts[4].model_copy(update={"previous": put_in.digest})
    write(store / "audit" / acts[4].digest, changed.to_bytes())
    found = copy.json("verify", "demo", code=7)
    assert "audit entry 5 was altered" in damage(found)["the audit trail"]


def test_an_entry_outside_of_the_trail_is_noted(copy: Shell) -> None:
    stray = copy.acts()[3].model_copy(update={"reason": "stray"})
    (copy.home / "store" / "audit" / stray.digest).write_bytes(stray.to_bytes())
    found = copy.json("verify", "demo")
    (note,) = found["findings"]
    assert (note["kind"], note["subject"]) == ("note", f"audit entry {stray.digest[:16]}")
    assert "act 4" in note["text"]


def forged(shell: Shell, change: Callable[[list[Entry]], list[Entry]]) -> None:
    """Rewrite the whole trail and the line's state, as somebody with write access could."""
    store = shell.home / "store"
    entries = change(shell.acts())
    shutil.rmtree(store / "audit")
    (store / "audit").mkdir()
    previous: str | None = None
    for number, entry in enumerate(entries, 1):
        entry = entry.model_copy(update={"previous": previous, "sequence": number})
        previous = digest_bytes(entry.to_bytes())
        (store / "audit" / previous).write_bytes(entry.to_bytes())
    line_state = json.loads(shell.head_bytes() or b"")
    line_state |= {"entry": previous, "sequence": len(entries)}
    write(store / "lines" / "demo" / "head.json", json.dumps(line_state).encode())


def test_mlflow_reveals_a_trail_that_was_rewritten_as_a_whole(copy: Shell) -> None:
    forged(copy, lambda acts: [a.model_copy(update={"actor": "somebody"}) for a in acts])
    found = damage(copy.json("verify", "demo", code=7))
    assert len(found) == len(copy.acts())
    (first,) = (text for name, text in found.items() if name.startswith("act 0001 configured "))
    assert "is not in the trail" in first


def test_a_trail_that_was_cut_short_is_found(copy: Shell) -> None:
    """The line's state of that time is put back: a rollback that nobody decided."""
    short = copy.acts()[:-1]
    with copy.inside():
        from datetime import datetime

        old = copy.ledger().state_at(datetime.fromisoformat(short[-1].time))
    assert old is not None
    write(copy.home / "store" / "lines" / "demo" / "head.json", old.model_dump_json().encode())
    found = copy.json("verify", "demo", code=7)
    last = f"act {len(short) + 1:04d} promoted version "
    (text,) = (text for name, text in damage(found).items() if name.startswith(last))
    assert "is not in the trail" in text


def test_a_state_that_contradicts_the_trail_is_found(copy: Shell) -> None:
    file = copy.home / "store" / "lines" / "demo" / "head.json"
    line_state = json.loads(file.read_bytes())
    write(file, json.dumps({**line_state, "champion": 1}).encode())
    found = damage(copy.json("verify", "demo", code=7))
    assert "/champion is 1, but its acts give 3" in found["the line's state"]


@pytest.mark.parametrize("what", ["patch", "delta", "record", "result"])
@pytest.mark.parametrize("how", ["altered", "missing"])
def test_a_damaged_object_is_found_and_named(copy: Shell, what: str, how: str) -> None:
    ledger = copy.ledger()
    record = ledger.merged(2)
    digest = {
        "patch": record.patch,
        "delta": record.members["number"].delta,
        "record": copy.state().versions[2],
        "result": record.results["number"].evaluations["grafted"],
    }[what]
    file = copy.home / "store" / "blobs" / digest
    if how == "missing":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        write(file, bytes(data))
    found = copy.json("verify", "demo", code=7)
    texts = damage(found)
    assert any(digest in text for text in texts.values())
    subject = "the delta of number 1" if what == "delta" else "version 2"
    assert any(name.startswith(subject) for name in texts)
    if what == "patch":
        assert found["rebuilt"] == [1, 3]
    if what == "delta":
        assert found["rebuilt"] == [1]
    if what == "result":
        assert found["rebuilt"] == [1, 2, 3]


def test_a_model_that_is_not_in_a_version_is_proved_absent(three: Three) -> None:
    weights = three.shell.state().tasks["animal"].versions[1].model.weights
    for name in ("animal", "animal/1", weights, weights[:10]):
        found = three.shell.json("verify", "demo", "--without", name, code=5)
        claim = found["claim"]
        assert claim["digests"] == {weights: "animal 1"}
        assert (claim["absent_from"], claim["present_in"]) == ([1, 2], [3])
    found = three.shell.json("verify", "demo", "--version", "2", "--without", "animal")
    assert found["claim"]["absent_from"] == [2]
    output = plain(three.shell("verify", "demo", "--version", "2", "--without", "animal").out)
    assert "it is not in version 2: rebuilt without it" in output


def test_a_digest_that_the_line_never_held_is_absent_from_every_version(three: Three) -> None:
    found = three.shell.json("verify", "demo", "--without", "ab" * 32)
    assert found["claim"]["absent_from"] == [1, 2, 3]


@pytest.mark.parametrize("name", ["colur", "colour/7", "abc", "0" * 12])
def test_an_unknown_model_is_refused(three: Three, name: str) -> None:
    done = three.shell("verify", "demo", "--without", name, code=3)
    assert name in plain(done.err) or name.partition("/")[2] in plain(done.err)


def test_a_record_with_other_members_than_its_recipe_is_damaged(copy: Shell) -> None:
    ledger = copy.ledger()
    record = ledger.merged(3)
    member = record.members["colour"].model_copy(update={"weights": "0" * 64})
    lie = record.model_copy(update={"members": {**record.members, "colour": member}})
    with copy.inside():
        ledger.objects.put_blob(lie.to_bytes())
    file = copy.home / "store" / "lines" / "demo" / "head.json"
    line_state = json.loads(file.read_bytes())
    line_state["versions"]["3"] = lie.digest
    write(file, json.dumps(line_state).encode())
    texts = damage(copy.json("verify", "demo", code=7))
    assert "its recipe has other members than its record" in texts["version 3"]
    assert "/versions/3" in texts["the line's state"]


def test_without_mlflow_a_note_says_what_goes_unnoticed(three: Three) -> None:
    server = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    away = Shell(three.shell.home, server)
    found = away.json("verify", "demo")
    assert found["intact"]
    assert not found["mlflow"]
    (note,) = found["findings"]
    assert "cut short would go unnoticed" in note["text"]


def test_a_line_that_changes_during_the_verification_is_intact(
    copy: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One act comes after MLflow was read and before the trail is, and one while it is read."""
    from restitch.registry.ledger.ledger import Ledger

    real = Ledger.entries
    acts: list[Literal["pinned", "unpinned"]] = ["pinned", "unpinned"]

    def slowly(self: Ledger, *, newest_first: bool = True) -> Any:
        if newest_first and acts:
            kind = acts.pop(0)
            self.act(kind, "somebody", "meanwhile", lambda h: h.with_pin(kind == "pinned"))
        return real(self, newest_first=newest_first)

    monkeypatch.setattr(Ledger, "entries", slowly)
    found = copy.json("verify", "demo")
    assert not acts
    assert found["intact"]
    assert found["findings"] == []
