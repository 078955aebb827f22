"""Hostile model folders: too large, deeply nested, or changed while they are read."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from restitch.merging.errors import BadInput, Damage
from restitch.merging.files.sparse import SparseFile, SparseTensor, write_sparse
from restitch.merging.recipe import Recipe
from restitch.modeling.data.records import read_records
from restitch.modeling.families.family import get_family
from restitch.tasks.inputs.checkpoints import describe_model, open_base
from restitch.tasks.inputs.live_base import live_base
from restitch.tasks.merge import recipe_edits
from restitch.tasks.runtime.refs import LineRef, WeightsRef
from restitch.tasks.runtime.workspace import workspace
from tests.conftest import Three
from tests.shell import Shell
from tests.worlds import World, copied

WEIGHTS = "model.safetensors"

pytestmark = pytest.mark.usefixtures("without_mlflow")


@pytest.fixture
def line(world: World, shell: Shell, tmp_path: Path) -> Shell:
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    return shell


def register(line: Shell, world: World, model: Path, code: int) -> str:
    args = ("register", "demo", "--task", world.task("colour"), "--model", model, "--here")
    return line(*args, code=code).err


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "config.json"])
def test_a_tokenizer_of_a_terabyte_is_refused_without_reading_it(
    world: World, line: Shell, tmp_path: Path, name: str
) -> None:
    def enlarged(folder: Path) -> None:
        with (folder / name).open("r+b" if (folder / name).exists() else "wb") as file:
            file.truncate(1 << 40)  # a sparse file takes no space

    model = copied(world.model("colour"), tmp_path / "model", enlarged)
    before = line.head_bytes()
    told = register(line, world, model, 3)
    assert f"{name} is too large" in told.replace("\n", "")
    assert line.head_bytes() == before


def test_a_configuration_nested_without_end_is_refused(
    world: World, line: Shell, tmp_path: Path
) -> None:
    def nested(folder: Path) -> None:
        (folder / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)

    model = copied(world.model("colour"), tmp_path / "model", nested)
    register(line, world, model, 4)
    assert line.kinds()[-1] == "quarantined"


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_rows_nested_without_end_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(BadInput, match="JSON"):
        list(read_records(tmp_path / name))


def written_to(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    at = file.stat()
    with file.open("r+b") as out:
        out.write(data)
    os.utime(file, ns=(at.st_atime_ns, at.st_mtime_ns + 10**9))


def replaced(file: Path) -> None:
    new = file.with_name("new")
    new.write_bytes(file.read_bytes())
    new.replace(file)


def removed(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("change", [written_to, replaced, removed])
def test_a_model_that_changes_while_it_is_registered_is_refused(
    world: World, line: Shell, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    model = copied(world.model("colour"), tmp_path / "model", lambda _: None)
    family = get_family(world.family)

    class Changing:
        """A family that changes the folder while it is described."""

        def __getattr__(self, name: str) -> Any:
            return getattr(family, name)

        def asset_files(self, folder: Path) -> tuple[str, ...]:
            if (folder / WEIGHTS).exists() and not (folder / "done").exists():
                (folder / "done").touch()
                change(folder / WEIGHTS)
            return family.asset_files(folder)

    with line.inside(), pytest.raises(BadInput, match="changed while it was read"):
        describe_model(str(model), Changing(), workspace())


def test_a_model_that_changes_while_it_is_localized_leaves_no_mask(
    world: World, line: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copied(world.model("colour"), tmp_path / "model", lambda _: None)
    good = (model / WEIGHTS).read_bytes()

    def changing(*args: Any, **options: Any) -> Any:
        written_to(model / WEIGHTS)
        return write_sparse(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr("restitch.tasks.localize.write_sparse", changing)
        told = register(line, world, model, 3)
    assert "changed while it was read" in told.replace("\n", "")
    assert not line.state().members
    (model / WEIGHTS).write_bytes(good)
    line("remerge", "demo")
    assert [member.task for member in line.state().members] == ["colour"]


def test_a_delta_of_another_base_is_not_stitched(
    three: Three, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with three.shell.inside():
        space = workspace(to_write=False)
        ledger = three.shell.ledger()
        line_state = ledger.state()
        assert line_state.champion is not None
        recipe = Recipe.from_json(ledger.merged(line_state.champion).recipe)
        base = open_base(LineRef(line_state.spec, line_state.base), space)
        recipe_edits(base, recipe, space)  # works without the change below
        name = base.names[0]
        shape = base.checkpoint.info(name).shape
        foreign = SparseTensor(name, shape, torch.tensor([0]), torch.ones(1))
        file = tmp_path / "delta"
        write_sparse(file, [foreign], kind="delta", metadata={"base": "00" * 32})
        opened = SparseFile.open(file)
        monkeypatch.setattr(SparseFile, "open", lambda *_: opened)
        with pytest.raises(Damage, match="another base"):
            recipe_edits(base, recipe, space)


def test_an_index_cannot_leave_its_folder(world: World, line: Shell, tmp_path: Path) -> None:
    def led_out(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder.parent / "outside.safetensors")
        index = {"weight_map": {"a": "../outside.safetensors"}}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))

    model = copied(world.model("colour"), tmp_path / "model", led_out)
    assert "outside of its folder" in register(line, world, model, 3).replace("\n", " ")


def test_a_model_that_changed_is_not_evaluated(world: World, line: Shell, tmp_path: Path) -> None:
    model = copied(world.model("colour"), tmp_path / "model", lambda _: None)
    register(line, world, model, 0)
    line_state = line.state()
    with line.inside():
        space = workspace()
        live = live_base(open_base(LineRef(line_state.spec, line_state.base), space), "test")
        ref = line_state.tasks["colour"].versions[1].model
        weights = WeightsRef("finetuned", ref.weights, ref.uri)
        with live.wearing(weights, space):
            pass
        written_to(model / WEIGHTS)
        with pytest.raises(BadInput, match="changed since"), live.wearing(weights, space):
            pass
