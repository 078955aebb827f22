"""The bytes of a merged version depend on its recipe only, however the line got there."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from restitch.merging.recipe import Recipe
from restitch.merging.rules.stitch import write_patch
from restitch.registry.ledger.finetuned_models import ModelKey
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import LineState
from tests.conftest import NewHome, Three
from tests.shell import Shell
from tests.worlds import SKILLS, World, copied, write_yaml

pytestmark = pytest.mark.usefixtures("without_mlflow")


class Bare:
    """Lines whose tasks have no data: all of the bytes and none of the evaluations."""

    def __init__(self, world: World, new_home: NewHome, folder: Path) -> None:
        self.world, self.new_home, self.folder = world, new_home, folder

    def line(self, name: str) -> Shell:
        shell = self.new_home(name)
        shell("init", self.world.line(self.folder / "line.yaml", retention=None))
        return shell

    def add(self, shell: Shell, task: str, *options: str, model: str = "") -> None:
        file = write_yaml(self.folder / f"{task}.yaml", {"task": task})
        model_folder = self.world.model(model or task)
        shell("register", "demo", "--task", file, "--model", model_folder, *options)


@pytest.fixture
def bare(world: World, new_home: NewHome, tmp_path: Path) -> Bare:
    return Bare(world, new_home, tmp_path)


def test_the_order_of_registration_does_not_matter(bare: Bare) -> None:
    found = set()
    for number, order in enumerate(permutations(SKILLS)):
        shell = bare.line(f"home-{number}")
        for task in order:
            bare.add(shell, task)
        record = shell.ledger().merged(3)
        found.add((record.recipe_digest, shell.patch_bytes()))
    assert len(found) == 1


def test_restitching_step_by_step_equals_restitching_from_nothing(bare: Bare, three: Three) -> None:
    shell = bare.line("home")
    for task in SKILLS:
        bare.add(shell, task, "--no-remerge")
    assert shell.json("remerge", "demo")["version"] == 1
    assert shell.patch_bytes() == three.shell.patch_bytes(), "with or without data"


def test_a_version_is_rebuilt_from_its_recorded_recipe(three: Three, tmp_path: Path) -> None:
    from restitch.tasks.inputs.checkpoints import open_base
    from restitch.tasks.merge import recipe_edits
    from restitch.tasks.runtime.refs import LineRef
    from restitch.tasks.runtime.workspace import workspace

    line_state = three.shell.state()
    for version in line_state.versions:
        record = three.shell.ledger().merged(version)
        recipe = Recipe.from_json(record.recipe)
        assert recipe.digest() == record.recipe_digest
        with three.shell.inside():
            space = workspace()
            base = open_base(LineRef(line_state.spec, line_state.base), space)
            metadata = {"base": recipe.base.weights, "recipe": recipe.digest()}
            file = tmp_path / f"{version}.safetensors"
            write_patch(file, base.checkpoint, recipe_edits(base, recipe, space), metadata)
        assert file.read_bytes() == three.shell.patch_bytes(version)


def test_a_retirement_gives_the_bytes_of_a_line_without_the_model(bare: Bare) -> None:
    shell, without = bare.line("home"), bare.line("without")
    for task in SKILLS:
        bare.add(shell, task)
    for task in ("colour", "animal"):
        bare.add(without, task)

    def retire(line_state: LineState) -> LineState:
        return line_state.with_state("number", 1, "retired", "no longer wanted")

    shell.ledger().act("retired", "tester", "number 1", retire)
    assert shell.json("remerge", "demo")["version"] == 4
    assert set(shell.ledger().merged(4).members) == {"colour", "animal"}
    assert shell.patch_bytes() == without.patch_bytes()
    assert shell.json("remerge", "demo")["action"] == "unchanged"


def test_a_replaced_member_leaves_no_trace(bare: Bare) -> None:
    shell, other = bare.line("home"), bare.line("other")
    bare.add(shell, "number")
    bare.add(shell, "colour")
    bare.add(shell, "colour", model="colour-2")
    bare.add(other, "colour", model="colour-2")
    bare.add(other, "number")
    assert shell.patch_bytes() == other.patch_bytes()


def test_registering_older_weights_again_makes_a_new_version(bare: Bare) -> None:
    shell = bare.line("home")
    bare.add(shell, "colour")
    bare.add(shell, "colour", model="colour-2")
    bare.add(shell, "colour")
    assert shell.state().tasks["colour"].ready == 3
    assert shell.state().champion == 3
    assert shell.patch_bytes(3) == shell.patch_bytes(1)


@pytest.mark.parametrize("choice", [{"density": 0.1}, {"density": 0.3, "exclude": ["*.bias"]}])
def test_changed_mask_settings_give_the_bytes_of_a_line_that_always_had_them(
    bare: Bare, world: World, tmp_path: Path, choice: dict[str, Any]
) -> None:
    def configure(shell: Shell, localize: dict[str, Any]) -> None:
        shell("init", world.line(tmp_path / "line.yaml", retention=None, localize=localize))

    shell, other = bare.new_home("home"), bare.new_home("other")
    configure(shell, {"density": 0.3})
    configure(other, choice)
    for task in ("colour", "number"):
        bare.add(shell, task)
        bare.add(other, task)
    configure(shell, choice)
    found = shell.json("remerge", "demo")
    assert found["localized"] == ["colour 1", "number 1"]
    assert shell.patch_bytes() == other.patch_bytes()
    assert shell.json("remerge", "demo")["action"] == "unchanged"
    configure(shell, {"density": 0.3})
    assert shell.json("remerge", "demo")["version"] == 4
    assert shell.patch_bytes(4) == shell.patch_bytes(2)
    assert shell.json("remerge", "demo")["action"] == "unchanged"


def test_a_member_that_cannot_be_localized_again_stops_merges(
    bare: Bare, world: World, tmp_path: Path
) -> None:
    """A version that mixes old and new masks would be neither the old nor the new one."""
    shell = bare.line("home")
    model = copied(world.model("colour"), tmp_path / "model")
    task = write_yaml(tmp_path / "colour.yaml", {"task": "colour"})
    shell("register", "demo", "--task", task, "--model", model)
    bare.add(shell, "number")
    shutil.move(model, tmp_path / "away")
    localize = {"density": 0.1}
    shell("init", world.line(tmp_path / "line.yaml", retention=None, localize=localize))
    kinds = shell.kinds()
    done = shell("remerge", "demo", code=6)
    assert "keeps its old mask" in done.err
    assert "restore the model's source" in done.err.replace("\n", " ")
    assert "no new mask of colour 1" in done.out
    assert shell.kinds() == [*kinds, "localized"], "the other mask is made"
    before = shell.head_bytes()
    found = shell.json("remerge", "demo", "--force", code=6)
    assert (found["action"], list(found["missing"])) == ("waiting", ["colour 1"])
    files = ("--task", write_yaml(tmp_path / "animal.yaml", {"task": "animal"}))
    done = shell("register", "demo", *files, "--model", world.model("animal"), code=6)
    assert "no new mask of colour 1" in done.out
    shutil.move(tmp_path / "away", model)
    found = shell.json("remerge", "demo")
    assert (found["action"], found["version"]) == ("promoted", 3)
    assert found["localized"] == ["colour 1"]
    assert before is not None
    assert shell.json("remerge", "demo")["action"] == "unchanged"


def test_a_retirement_ends_the_wait_for_a_mask(bare: Bare, world: World, tmp_path: Path) -> None:
    shell = bare.line("home")
    model = copied(world.model("colour"), tmp_path / "model")
    task = write_yaml(tmp_path / "colour.yaml", {"task": "colour"})
    shell("register", "demo", "--task", task, "--model", model)
    bare.add(shell, "number")
    shutil.rmtree(model)
    localize = {"density": 0.1}
    shell("init", world.line(tmp_path / "line.yaml", retention=None, localize=localize))
    shell("remerge", "demo", code=6)
    found = shell.json("retire", "demo", "colour", "--reason", "its weights are gone")
    assert found["merged"]["action"] == "promoted"
    assert shell.ledger().merged(3).members.keys() == {"number"}


def test_workers_make_all_masks_before_one_merge(
    bare: Bare, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import restitch.flows.remerge as module
    from restitch.flows.onboard import onboard

    shell, other = bare.line("home"), bare.new_home("other")
    for task in SKILLS:
        bare.add(shell, task)
    localize = {"density": 0.1}
    shell("init", world.line(tmp_path / "line.yaml", retention=None, localize=localize))
    started: list[Any] = []

    def start(_: Ledger, key: ModelKey) -> str:
        started.append(key)
        return module._STARTED

    monkeypatch.setattr(module, "has_workers", lambda: True)
    monkeypatch.setattr(module, "_start_onboard", start)
    kinds = shell.kinds()
    found = shell.json("remerge", "demo")
    assert (found["action"], len(found["missing"])) == ("waiting", 3)
    assert [key.task for key in started] == sorted(SKILLS)
    for task in SKILLS:
        with shell.inside():
            onboard("demo", task, 1)
        found = shell.json("remerge", "demo")
    assert (found["action"], found["version"]) == ("promoted", 4)
    assert shell.kinds() == [*kinds, *["localized"] * 3, "merged", "promoted"]
    other("init", world.line(tmp_path / "other.yaml", retention=None, localize=localize))
    for task in SKILLS:
        bare.add(other, task)
    assert shell.patch_bytes() == other.patch_bytes()


def test_each_model_is_localized_once_and_never_in_a_later_remerge(three: Three) -> None:
    shell = three.shell
    acts = shell.acts()
    localized = [act for act in acts if act.kind == "localized"]
    models = [model for task in shell.state().tasks.values() for model in task.versions.values()]
    assert len(localized) == len(models) == 3
    assert {act.digests["delta"] for act in localized} == {model.delta for model in models}
    expected = ["configured", *["registered", "localized", "merged", "promoted"] * 3]
    assert [act.kind for act in acts] == expected
    keys = sorted((shell.home / "store" / "keys" / "mask").iterdir())
    assert len(keys) == 3


def test_a_second_remerge_does_nothing_and_says_so(three: Three) -> None:
    before = three.shell.head_bytes()
    found = three.shell.json("remerge", "demo")
    assert (found["action"], found["version"], found["localized"]) == ("unchanged", 3, [])
    assert "nothing changed" in three.shell("remerge", "demo").out
    assert three.shell.head_bytes() == before


def test_a_forced_remerge_makes_the_same_bytes(three: Three) -> None:
    before, patch = three.shell.head_bytes(), three.shell.patch_bytes()
    found = three.shell.json("remerge", "demo", "--force")
    assert (found["action"], found["version"]) == ("unchanged", 3)
    assert three.shell.patch_bytes() == patch
    assert three.shell.head_bytes() == before


def test_a_forced_remerge_detects_a_patch_that_does_not_match_its_recipe(bare: Bare) -> None:
    shell = bare.line("home")
    bare.add(shell, "colour")
    bare.add(shell, "number")
    first, second = (shell.ledger().merged(version) for version in (1, 2))
    key = shell.home / "store" / "keys" / "patch" / second.recipe_digest
    key.write_text(key.read_text().replace(second.patch, first.patch))
    done = shell("remerge", "demo", "--force", code=7)
    assert second.recipe_digest[:12] in done.err


@pytest.mark.parametrize("kind", ["delta", "patch"])
def test_a_damaged_object_is_found_before_it_is_used(bare: Bare, kind: str, tmp_path: Path) -> None:
    shell = bare.line("home")
    bare.add(shell, "colour")
    record = shell.ledger().merged(1)
    digest = record.patch if kind == "patch" else record.members["colour"].delta
    blob = shell.home / "store" / "blobs" / digest
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    before = shell.head_bytes()
    if kind == "patch":
        done = shell("export", "demo", "champion", tmp_path / "out", code=7)
        assert not (tmp_path / "out").exists()
    else:
        done = shell("remerge", "demo", "--force", code=7)
    assert digest in done.err
    assert shell.head_bytes() == before


def test_models_registered_at_once_are_all_in_the_champion(bare: Bare) -> None:
    from restitch.flows.register import register

    shell = bare.line("home")
    tasks = {f"task-{number}": SKILLS[number % 3] for number in range(6)}
    for task in tasks:
        write_yaml(bare.folder / f"{task}.yaml", {"task": task})

    def run(task: str) -> int:
        file, model = bare.folder / f"{task}.yaml", str(bare.world.model(tasks[task]))
        return register("demo", file, model).exit_code

    with shell.inside(), ThreadPoolExecutor(len(tasks)) as pool:
        assert list(pool.map(run, tasks)) == [0] * len(tasks)
    line_state = shell.state()
    assert line_state.champion is not None
    assert set(shell.ledger().merged(line_state.champion).members) == set(tasks)
    kinds = shell.kinds()
    assert kinds.count("registered") == kinds.count("localized") == len(tasks)
    assert line_state.candidate is None


@pytest.mark.parametrize("moment", ["before it is recorded", "before it is promoted"])
def test_a_slow_worker_never_replaces_a_newer_champion(
    bare: Bare, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """On another host, where no lock keeps them apart."""
    import restitch.flows.remerge as module

    shell = bare.line("home")
    for task in ("colour", "number"):
        bare.add(shell, task, "--no-remerge")
    monkeypatch.setattr(module, "merge_lease", lambda *_: nullcontext(True))
    name = "make_candidate" if moment == "before it is recorded" else "record_version"
    real, waiting = getattr(module, name), [True]

    def slow(*args: Any, **options: Any) -> Any:
        found = real(*args, **options)
        if waiting:
            waiting.clear()
            bare.add(shell, "animal")
        return found

    monkeypatch.setattr(module, name, slow)
    shell("remerge", "demo")
    line_state = shell.state()
    assert line_state.champion is not None
    assert set(shell.ledger().merged(line_state.champion).members) == set(SKILLS)
    assert shell.json("remerge", "demo")["action"] == "unchanged"


@pytest.mark.parametrize("what", ["head", "entry", "record"])
def test_a_damaged_record_of_the_line_is_exit_code_7(bare: Bare, what: str) -> None:
    shell = bare.line("home")
    bare.add(shell, "colour")
    store = shell.home / "store"
    line_state = shell.state()
    place = {
        "head": store / "lines" / "demo" / "head.json",
        "entry": store / "audit" / str(line_state.entry),
        "record": store / "blobs" / line_state.versions[1],
    }[what]
    place.chmod(0o644)
    place.write_bytes(b"{" if what == "head" else place.read_bytes().replace(b"demo", b"damo"))
    done = shell("history", "demo", "--versions", code=7)
    assert "Traceback" not in done.err
    assert place.name in done.err.replace("\n", "")
