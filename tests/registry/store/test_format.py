"""The format number of a store, in a folder and in a bucket."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from restitch.merging.errors import BadInput
from restitch.registry.home import Home
from restitch.registry.ledger.ledger import Ledger, lines
from restitch.registry.store.format import FORMAT, MARKER, check_format
from restitch.registry.store.objects import ObjectStore
from tests.conftest import NewHome
from tests.registry.builders import ledger, line_spec, model_ref


@pytest.fixture(params=["folder", "bucket"])
def home(request, tmp_path):
    """A home whose store is empty."""
    if request.param == "folder":
        return Home(tmp_path)
    return Home(tmp_path, f"s3://{request.getfixturevalue('s3_bucket')}/{tmp_path.name}")


def new_line(home: Home, line: str = "line") -> None:
    made = Ledger(ObjectStore(home.open_store()), line)
    made.create(line_spec(line), model_ref("base"), "tester", "a new line")


def test_an_empty_store_is_opened_and_gets_no_marker(home):
    assert list(home.open_store().list()) == []


def test_a_store_gets_its_format_number_with_its_first_line(home):
    new_line(home)
    assert json.loads(home.open_store().read(MARKER)) == {"format": FORMAT}
    new_line(home, "another")
    assert list(lines(ObjectStore(home.open_store()))) == ["another", "line"]


@pytest.mark.parametrize(
    ("marker", "found"),
    [
        (b'{"format": 0}', "0"),
        (b'{"format": 99}', "99"),
        (b'{"format": "1.5"}', "1.5"),
        (b"no JSON", "an unreadable format.json"),
        (b"[1]", "an unreadable format.json"),
        (None, "no format number"),
    ],
)
def test_a_store_of_another_format_is_refused(home, marker, found):
    new_line(home)
    store = home.open_store()
    store.remove(MARKER)
    if marker is not None:
        store.put(MARKER, marker)
    with pytest.raises(BadInput, match="has another format") as raised:
        home.open_store()
    assert (raised.value.found, raised.value.exit_code) == (found, 3)
    assert store.address in str(raised.value)


def test_two_processes_may_create_a_store_at_once(home):
    def create(name: str) -> None:
        new_line(home, name)

    names = [f"line-{number}" for number in range(8)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(create, names))
    assert list(lines(ObjectStore(home.open_store()))) == names


def test_a_store_that_another_process_makes_meanwhile_is_not_refused(home, monkeypatch):
    store = home.open_store()
    listed = store.list

    def made_meanwhile(prefix=""):
        monkeypatch.setattr(store, "list", listed)
        new_line(home)
        return listed(prefix)

    monkeypatch.setattr(store, "list", made_meanwhile)
    check_format(store)
    assert list(store.list("lines"))


def test_a_line_is_not_created_in_a_store_that_became_another_format(home):
    store = home.open_store()
    store.put(MARKER, b'{"format": 99}')
    with pytest.raises(BadInput, match="has another format"):
        Ledger(ObjectStore(store), "line").create(line_spec(), model_ref("base"), "tester", "")
    assert list(store.list()) == [MARKER]


def test_every_command_refuses_a_store_of_an_older_format(new_home: NewHome, tmp_path: Path):
    shell = new_home("home")
    store = ledger(shell.home / "store").objects.store
    before = {name: store.read(name) for name in store.list() if name != MARKER}
    store.remove(MARKER)
    for command in (
        ("status",),
        ("status", "line"),
        ("show", "line"),
        ("history", "line"),
        ("remerge", "line"),
        ("verify",),
        ("gc",),
        ("store", "copy", store.address, tmp_path / "copy"),
        ("store", "copy", tmp_path / "copy", store.address),
    ):
        message = shell(*command, code=3).err
        assert f"the store {store.address} has another format" in message
    assert {name: store.read(name) for name in store.list()} == before


def test_a_copied_store_keeps_its_format_number(new_home: NewHome, tmp_path: Path):
    shell = new_home("home")
    ledger(shell.home / "store")
    shell("store", "copy", shell.home / "store", tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / MARKER).read_bytes()) == {"format": FORMAT}
