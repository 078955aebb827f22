"""A line file can allow decisions to listed actors; others are refused and change nothing."""

from dataclasses import replace
from pathlib import Path

import pytest

from restitch.registry.ledger.line_state import LineState
from restitch.registry.specs.line import LineSpec
from tests.conftest import NewHome
from tests.flows.test_decisions import Line
from tests.shell import Shell
from tests.worlds import World

pytestmark = pytest.mark.usefixtures("without_mlflow")

DECISIONS = {
    "promote": ("promote", "demo", 1),
    "rollback": ("rollback", "demo", 1),
    "retire": ("retire", "demo", "colour"),
    "restore": ("restore", "demo", "colour"),
    "pin": ("pin", "demo"),
    "unpin": ("unpin", "demo"),
    "forget": ("forget", "demo", "colour/1"),
    "drop": ("drop", "demo"),
}


def as_actor(shell: Shell, name: str) -> Shell:
    return replace(shell, environment={"RESTITCH_ACTOR": name})


@pytest.fixture(scope="module")
def guarded(
    world: World, tmp_path_factory: pytest.TempPathFactory, empty_mlflow: Path
) -> tuple[Shell, Path]:
    """A line with two members on which nobody but ann decides; refusals leave it as it is."""
    root = tmp_path_factory.mktemp("guarded")
    shell = Shell(root / "home")
    shell.home.mkdir()
    (shell.home / "mlflow.db").write_bytes(empty_mlflow.read_bytes())
    shell("init", world.line(root / "line.yaml", retention=None, actors=["ann"]))
    for task in ("colour", "number"):
        as_actor(shell, "trainer").add(world, task)
    return shell, root


@pytest.mark.parametrize("decision", DECISIONS)
def test_an_actor_who_is_not_listed_is_refused_and_nothing_is_written(
    guarded: tuple[Shell, Path], decision: str
) -> None:
    shell, _ = guarded
    before, files = shell.head_bytes(), sorted((shell.home / "store").rglob("*"))
    done = as_actor(shell, "bob")(*DECISIONS[decision], "--reason", "because", code=3)
    assert f"bob may not {decision} on line demo" in done.err
    assert "one of ann" in done.err
    assert "RESTITCH_ACTOR" in done.err
    assert shell.head_bytes() == before
    assert sorted((shell.home / "store").rglob("*")) == files


def test_a_promotion_by_a_remerge_needs_no_listed_actor(guarded: tuple[Shell, Path]) -> None:
    shell, _ = guarded
    assert shell.state().champion == 2
    promoted = [entry for entry in shell.acts() if entry.kind == "promoted"]
    assert {entry.actor for entry in promoted} == {"trainer"}


def test_a_listed_actor_decides(world: World, shell: Shell, tmp_path: Path) -> None:
    line = Line(world, shell, tmp_path, "colour", "number", actors={"rollback": ["ann", "bob"]})
    as_actor(shell, "carl")("rollback", "demo", 1, "--reason", "because", code=3)
    as_actor(shell, "bob")("rollback", "demo", 1, "--reason", "because")
    assert (line.state().champion, shell.acts()[-1].actor) == (1, "bob")
    as_actor(shell, "carl")("unpin", "demo", "--reason", "nobody is listed for this")
    assert line.state().champion != 1


def test_the_list_is_changed_by_an_act(world: World, shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "line.yaml"
    shell("init", world.line(file, retention=None, actors={"pin": ["ann"]}))
    as_actor(shell, "bob")("pin", "demo", "--reason", "because", code=3)
    as_actor(shell, "bob")("init", world.line(file, retention=None, actors={"pin": ["bob"]}))
    act = shell.acts()[-1]
    assert (act.kind, act.actor) == ("configured", "bob")
    assert "actors.pin: ann -> bob" in act.reason
    as_actor(shell, "bob")("pin", "demo", "--reason", "because")
    assert shell.state().pinned


def test_an_actor_who_is_removed_from_the_list_meanwhile_is_refused(
    world: World, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The list counts that the line has at the moment at which the act would count.
    file = tmp_path / "line.yaml"
    shell("init", world.line(file, retention=None, actors={"pin": ["bob"]}))
    changed: list[bool] = []

    def change_first(line_state: LineState, pinned: bool) -> LineState:
        if not changed:
            changed.append(True)
            shell("init", world.line(file, retention=None, actors={"pin": ["ann"]}))
        return with_pin(line_state, pinned)

    with_pin = LineState.with_pin
    monkeypatch.setattr(LineState, "with_pin", change_first)
    as_actor(shell, "bob")("pin", "demo", "--reason", "because", code=3)
    assert changed
    assert not shell.state().pinned


@pytest.mark.parametrize(
    ("actors", "part"),
    [
        ({"promte": ["ann"]}, "did you mean 'promote'"),
        ({"promote": []}, "actors.promote"),
        ({"promote": "ann"}, "actors.promote"),
        ({"promote": [7]}, "actors.promote"),
        ({"promote": [""]}, "actors.promote"),
        ([], "actors"),
    ],
)
def test_a_list_that_makes_no_sense_is_refused(
    world: World, new_home: NewHome, tmp_path: Path, actors: object, part: str
) -> None:
    done = new_home("home")("init", world.line(tmp_path / "l.yaml", actors=actors), code=3)
    assert part in done.err


def test_a_line_without_a_list_keeps_its_digest() -> None:
    spec = {"line": "demo", "base": "o/b", "family": "clip", "method": {"name": "m"}}
    plain = LineSpec.from_json(spec)
    assert LineSpec.from_json({**spec, "actors": None}).digest == plain.digest
    listed = LineSpec.from_json({**spec, "actors": {"pin": ["ann"]}})
    assert listed.digest != plain.digest
    assert listed.actors is not None
    assert (listed.actors.of("pin"), listed.actors.of("unpin")) == (("ann",), None)
    assert LineSpec.from_json(listed.to_json()) == listed
