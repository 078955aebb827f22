"""Helpers take a part of a merge and of its evaluation; bytes and keys are those of one process."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from restitch.flows.assist import AssistOutcome, assist, assist_all
from restitch.merging.errors import Unavailable
from restitch.tasks import merge
from restitch.tasks.evaluate import Evaluations
from restitch.tasks.merge import PatchParts
from restitch.tasks.runtime import sharing
from restitch.tasks.runtime.sharing import Offer, Work, offers
from restitch.tasks.runtime.workspace import workspace
from tests.conftest import Three
from tests.shell import Shell

pytestmark = pytest.mark.usefixtures("without_mlflow")


@pytest.fixture
def copy(three: Three, tmp_path: Path) -> Shell:
    """A home with three models in its champion, and nothing that was merged or measured of it."""
    shutil.copytree(three.shell.home, tmp_path / "home")
    shell = Shell(tmp_path / "home")
    objects, record = shell.ledger().objects, shell.ledger().merged(3)
    objects.store.remove(f"keys/patch/{record.recipe_digest}")
    for name in list(objects.store.list("keys/result")):
        objects.store.remove(name)
    return shell


def kept(shell: Shell, kind: str) -> dict[str, str]:
    """The results of a kind: their blobs by their keys."""
    objects = shell.ledger().objects
    names = (name.rpartition("/")[2] for name in objects.store.list(f"keys/{kind}"))
    records = {name: objects.lookup(kind, name) for name in names}
    return {name: record.blob for name, record in records.items() if record is not None}


def recipe_of(shell: Shell) -> Any:
    from restitch.merging.recipe import Recipe

    return Recipe.from_json(shell.ledger().merged(3).recipe)


def line_of(shell: Shell) -> Any:
    from restitch.tasks.runtime.refs import LineRef

    state = shell.state()
    return LineRef(state.spec, state.base)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part has one tensor."""
    monkeypatch.setenv("RESTITCH_PART_SIZE", "1B")
    monkeypatch.setattr(sharing, "POLL_SECONDS", 0.01)


def test_parts_give_the_patch_of_one_process(copy: Shell, three: Three, small_parts: None) -> None:
    with copy.inside():
        ref = merge.stitch(line_of(copy), recipe_of(copy))
    assert ref.blob == three.shell.ledger().merged(3).patch
    assert len(kept(copy, "part")) > 10


def test_a_small_model_has_no_parts(copy: Shell, three: Three) -> None:
    with copy.inside():
        ref = merge.stitch(line_of(copy), recipe_of(copy))
    assert ref.blob == three.shell.ledger().merged(3).patch
    assert not kept(copy, "part")


def test_a_merge_that_was_interrupted_makes_only_the_parts_that_are_missing(
    copy: Shell, three: Three, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = PatchParts.write, list[int]()

    def counted(parts: PatchParts, file: Path, number: int | None = None) -> Any:
        assert number is not None
        written.append(number)
        if len(written) == 4:
            raise Unavailable("the disk is full")
        return write(parts, file, number)

    monkeypatch.setattr(PatchParts, "write", counted)
    with copy.inside():
        line, recipe = line_of(copy), recipe_of(copy)
        with pytest.raises(Unavailable):
            merge.stitch(line, recipe)
        # Nothing but parts is visible.
        assert not kept(copy, "patch").get(recipe.digest())
        ref = merge.stitch(line, recipe)
    assert ref.blob == three.shell.ledger().merged(3).patch
    parts = len(kept(copy, "part"))
    assert written == [0, 1, 2, 3, *range(3, parts)]


def test_parts_of_another_environment_are_not_mixed(
    copy: Shell, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with copy.inside():
        parts = PatchParts(line_of(copy), recipe_of(copy), 1, workspace())
        monkeypatch.setattr(merge, "required_fingerprint", lambda *_: {"threads": 7})
        others = PatchParts(line_of(copy), recipe_of(copy), 1, workspace())
    assert not set(parts.work.keys) & set(others.work.keys)


@pytest.fixture
def helped(monkeypatch: pytest.MonkeyPatch, small_parts: None) -> list[AssistOutcome]:
    """A helper does its part of all work after the first piece; returns what it did."""
    monkeypatch.setenv("RESTITCH_SHARE_AFTER", "0")
    outcomes: list[AssistOutcome] = []
    next_turn = sharing._Shared._next

    def help_first(shared: Any, theirs: list[int]) -> int | None:
        is_second = len(shared._left) == len(shared._work.keys) - 1 and not theirs
        if is_second:
            while shared._work.identity not in offers(shared._space.objects.store):
                pass
            outcomes.append(next(assist_all("demo")))
        return next_turn(shared, theirs)

    monkeypatch.setattr(sharing._Shared, "_next", help_first)
    return outcomes


def test_a_helper_makes_parts_and_evaluations_with_the_same_bytes_and_keys(
    copy: Shell, three: Three, helped: list[AssistOutcome]
) -> None:
    with copy.inside():
        assert copy.json("evaluate", "demo", "3")["version"] == 3
        ref = merge.stitch(line_of(copy), recipe_of(copy))
    of_results, of_parts = helped
    assert (of_results.kind, of_results.pieces, of_results.count) == ("evaluate", (1, 2, 3), 4)
    assert (of_parts.kind, len(of_parts.pieces)) == ("stitch", len(kept(copy, "part")) - 1)
    assert not offers(copy.ledger().objects.store)
    record = three.shell.ledger().merged(3)
    assert ref.blob == record.patch
    mine = kept(copy, "result")
    assert mine.items() <= kept(three.shell, "result").items()
    assert {result.evaluations["merged"] for result in record.results.values()} <= {*mine.values()}


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_helpers_write_shards_and_the_folder_is_that_of_one_process(
    copy: Shell, three: Three, tmp_path: Path, helped: list[AssistOutcome]
) -> None:
    export = ("export", "demo", "3", "--shard-size", "3KB")
    three.shell(*export, tmp_path / "alone")
    copy(*export, tmp_path / "shared", "--with-workers")
    assert files_in(tmp_path / "shared") == files_in(tmp_path / "alone")
    [of_shards] = helped
    shards = kept(copy, "shard")
    assert len(shards) > 3
    assert (of_shards.kind, len(of_shards.pieces)) == ("export", len(shards) - 1)
    assert not offers(copy.ledger().objects.store)


def test_an_export_that_was_interrupted_writes_only_the_shards_that_are_missing(
    copy: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from restitch.merging.files.export import write_file as write

    written = list[str]()

    def counted(base: Any, edits: Any, path: Path, file: Any, progress: Any) -> None:
        written.append(file.name)
        if len(written) == 3:
            raise Unavailable("the disk is full")
        write(base, edits, path, file, progress)

    monkeypatch.setattr("restitch.tasks.export.write_file", counted)
    command = ("export", "demo", "3", tmp_path / "out", "--shard-size", "3KB", "--with-workers")
    copy(*command, code=6)
    assert not (tmp_path / "out").exists()
    copy(*command)
    assert len(written) == len(kept(copy, "shard")) + 1
    assert len({*written}) == len(written) - 1


@pytest.mark.parametrize(
    "options", [("--push", "me/model"), ("--as", "lora"), ("--task", "colour")]
)
def test_workers_write_whole_versions_only(
    copy: Shell, tmp_path: Path, options: tuple[str, str]
) -> None:
    command = ("export", "demo", "3", tmp_path / "out", "--with-workers", *options)
    assert "--with-workers" in copy(*command, code=2).err
    assert not (tmp_path / "out").exists()


def test_a_helper_declines_what_it_would_do_differently(copy: Shell) -> None:
    with copy.inside():
        space = workspace()
        parts = PatchParts(line_of(copy), recipe_of(copy), 1, space)
        for kind, keys in (("stitch", ("another",)), ("paint", parts.work.keys)):
            work = Work("demo", kind, parts.work.content, "part", keys)
            offer = Offer(space.objects.store, work.identity)
            offer.make(work)
            outcome = assist("demo", work.identity)
            assert outcome.declined
            assert not outcome.pieces
            offer.withdraw()
    assert not kept(copy, "part")


def test_a_helper_that_comes_too_late_does_nothing(copy: Shell) -> None:
    with copy.inside():
        assert assist("demo", "0" * 64) == AssistOutcome("demo", None)


def test_the_command_ends_when_nothing_is_offered(copy: Shell) -> None:
    assert copy("assist", "demo", "--idle", "0").out == ""


def test_evaluations_of_an_offer_are_those_of_the_process_that_offers_them(copy: Shell) -> None:
    from restitch.flows.promotion.versions import members_of
    from restitch.tasks.runtime.refs import WeightsRef

    with copy.inside():
        state, record = copy.state(), copy.ledger().merged(3)
        exams = [(m.spec, m.model.model) for m in members_of(state, record)]
        weights = WeightsRef("merged", record.patch)
        own = Evaluations(line_of(copy), weights, exams, workspace())
        again = Evaluations.of(own.work.content, workspace())
    assert again.work == own.work
