"""The type that a line computes in: which one it is, which keys it enters, what it changes."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from restitch.merging.digests import digest_json
from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.sparse import SparseFile
from restitch.modeling.families.family import get_family
from restitch.modeling.families.text_encoder import TextEncoder
from restitch.registry.ledger.finetuned_models import ModelKey
from restitch.tasks.evaluate import choice_inputs, result_inputs
from restitch.tasks.inputs import checkpoints
from restitch.tasks.inputs.checkpoints import Base, open_base
from restitch.tasks.inputs.live_base import check_compute, live_base
from restitch.tasks.inputs.task_head import head_inputs
from restitch.tasks.localize import mask_keys
from restitch.tasks.runtime.refs import LineRef, WeightsRef
from restitch.tasks.runtime.workspace import workspace
from tests.flows.test_localizing import with_splits
from tests.shell import Shell
from tests.worlds import World, write_yaml

pytestmark = pytest.mark.usefixtures("without_mlflow")


class Float32Only(TextEncoder):
    """A family from before there was a choice of types."""

    def load(self, folder: Path) -> torch.nn.Module:  # type: ignore[override]
        return super().load(folder)


def stored_as(dtype: torch.dtype, folder: Path, target: Path) -> Path:
    """A copy of a model with all weights in a type."""
    shutil.copytree(folder, target)
    file = target / "model.safetensors"
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def half_world(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The world with base and models in bfloat16; `colour` has train rows."""
    root = tmp_path_factory.mktemp("half")
    for name in ("base", "models/colour", "models/number"):
        stored_as(torch.bfloat16, world.root / name, root / name)
    for name in ("colour", "number"):
        data = root / "data" / name
        shutil.copytree(world.root / "data" / name, data)
        shutil.copyfile(data / "test.jsonl", data / "train.jsonl")
        task = yaml.safe_load(world.task(name).read_text())
        task["data"] |= {"path": str(data), "train": "train.jsonl"}
        write_yaml(root / f"{name}.yaml", task)
    return World(root, "text-encoder")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Let the worker have a GPU, with or without bfloat16, as far as types are chosen."""

    def have(has_bfloat16: bool) -> None:
        monkeypatch.setattr(checkpoints, "device", lambda: torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bfloat16)

    return have


def line(shell: Shell, world: World, folder: Path, **changes: Any) -> LineRef:
    shell("init", world.line(folder / "line.yaml", retention=None, **changes))
    state = shell.state(changes.get("line", "demo"))
    return LineRef(state.spec, state.base)


def opened(shell: Shell, of: LineRef) -> Base:
    with shell.inside():
        return open_base(of, workspace())


def test_auto_is_float32_on_a_cpu_and_the_type_of_the_base_on_a_gpu(
    shell: Shell, world: World, half_world: World, tmp_path: Path, gpu: Callable[[bool], None]
) -> None:
    single = opened(shell, line(shell, world, tmp_path))
    half = opened(shell, line(shell, half_world, tmp_path, line="half"))
    assert (single.compute_type, half.compute_type) == ("float32", "float32")
    gpu(True)
    assert (single.compute_type, half.compute_type) == ("float32", "bfloat16")
    gpu(False)
    assert (single.compute_type, half.compute_type) == ("float32", "float32")


def test_one_tensor_in_float32_keeps_auto_at_float32(
    shell: Shell, half_world: World, tmp_path: Path, gpu: Callable[[bool], None]
) -> None:
    base = stored_as(torch.bfloat16, half_world.base, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    last = max(tensors)
    save_file({**tensors, last: tensors[last].float()}, base / "model.safetensors")
    mixed = opened(shell, line(shell, half_world, tmp_path, base=str(base)))
    gpu(True)
    assert mixed.compute_type == "float32", "bfloat16 would round it"


def test_a_type_that_the_line_names_is_the_same_on_every_device(
    shell: Shell, half_world: World, tmp_path: Path, gpu: Callable[[bool], None]
) -> None:
    base = opened(shell, line(shell, half_world, tmp_path))
    assert [one.compute for one in base.in_each_type()] == ["float32", "bfloat16"]
    gpu(True)
    assert [one.compute for one in base.in_each_type()] == ["bfloat16", "float32"]
    for named in (replace(base, compute="float32"), replace(base, compute="bfloat16")):
        assert named.compute_type == named.compute
        assert named.in_each_type() == (named,)


def test_float32_enters_no_key_and_bfloat16_enters_all_that_run_the_model(
    shell: Shell, world: World, tmp_path: Path
) -> None:
    file = with_splits(world, tmp_path / "colour", "colour")
    of = line(shell, world, tmp_path, localize={"mode": "distilled"})
    shell("task", "demo", "--task", file)
    shell("register", "demo", "--task", file, "--model", world.model("colour"))
    state = shell.state()
    spec, model = state.tasks["colour"].spec, state.model(ModelKey("colour", 1)).model

    def keys(compute: str, **changes: Any) -> dict[str, str]:
        localize = of.spec.localize.model_copy(update=changes)
        update = {"compute": compute, "localize": localize}
        there = replace(of, spec=of.spec.model_copy(update=update))
        with shell.inside():
            space = workspace()
            base = open_base(there, space)
            result = result_inputs(spec, base, WeightsRef("base"), model)
            assert "compute" not in str(result)
            return {
                "result": digest_json(result),
                "choice": digest_json(choice_inputs(spec, base, model)),
                "mask": mask_keys(there, spec, model, space)[0],
                "head": digest_json(head_inputs(spec, base, model)),
            }

    assert keys("auto") == keys("float32")
    single, half = keys("float32"), keys("bfloat16")
    assert not set(single.values()) & set(half.values())
    dataless = {"mode": "dataless", "density": 0.1}
    assert keys("float32", **dataless)["mask"] == keys("bfloat16", **dataless)["mask"]


def test_a_live_model_has_the_type_and_gets_the_weights_of_the_base_back(
    shell: Shell, half_world: World, tmp_path: Path
) -> None:
    base = opened(shell, line(shell, half_world, tmp_path, compute="bfloat16"))
    model = half_world.model("colour")
    with shell.inside():
        live = live_base(base, "test")
        assert {tensor.dtype for tensor in live.model.parameters()} == {torch.bfloat16}
        before = {name: tensor.clone() for name, tensor in live.parameters.items()}
        worn = WeightsRef("finetuned", Checkpoint.open(model).digest(), str(model))
        with live.wearing(worn, workspace()):
            assert any(not torch.equal(before[n], t) for n, t in live.parameters.items())
        assert all(torch.equal(before[n], t) for n, t in live.parameters.items())
        assert live_base(base, "test") is live
        assert live_base(replace(base, compute="float32"), "test") is not live


MODES: list[dict[str, Any]] = [
    {"mode": "distilled", "density": 0.1},
    {"mode": "trained", "density": 0.1},
    {"mode": "trained", "preset": "official", "epochs": 2},
]


@pytest.mark.parametrize("localize", MODES, ids=lambda m: m.get("preset", m["mode"]))
def test_masks_in_bfloat16_are_nearly_those_in_float32(
    shell: Shell, half_world: World, tmp_path: Path, localize: dict[str, Any]
) -> None:
    masks = []
    for compute in ("float32", "bfloat16"):
        made = {"line": compute, "compute": compute, "localize": localize}
        line(shell, half_world, tmp_path, **made)
        task, model = half_world.task("colour"), half_world.model("colour")
        assert shell.json("register", compute, "--task", task, "--model", model)["state"] == "ready"
        delta = shell.state(compute).model(ModelKey("colour", 1)).delta
        with shell.inside():
            file = SparseFile.open(workspace().objects.blob_path(str(delta)))
            masks.append({(n, c) for n in file.names for c in file.coordinates(n).tolist()})
    single, half = masks
    assert len(single & half) > 0.8 * len(single | half)


def test_another_type_localizes_again_with_data_and_not_without(
    shell: Shell, half_world: World, tmp_path: Path
) -> None:
    task, model = half_world.task("colour"), half_world.model("colour")
    for mode, acts in (("dataless", 0), ("fisher", 1)):
        line(shell, half_world, tmp_path, line=mode, localize={"mode": mode})
        shell("register", mode, "--task", task, "--model", model)
        before = shell.kinds(mode).count("localized")
        line(shell, half_world, tmp_path, line=mode, localize={"mode": mode}, compute="bfloat16")
        shell("remerge", mode)
        assert shell.kinds(mode).count("localized") == before + acts


@pytest.mark.parametrize("method", ["fisher-merging", {"tournament": ["averaging", "ties"]}])
def test_what_a_gpu_measured_counts_on_a_cpu(
    shell: Shell, half_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    localize = {"mode": "dataless", "density": 1, "shots": 4}
    line(shell, half_world, tmp_path, method=method, localize=localize)
    with monkeypatch.context() as on_gpu:
        on_gpu.setattr(Base, "compute_type", property(lambda _: "bfloat16"))
        for name in ("colour", "number"):
            task = half_world.task(name)
            shell("register", "demo", "--task", task, "--model", half_world.model(name))
    (champion, kinds) = shell.state().champion, ("fisher", "method-selection")
    before = {kind: store_keys(shell, kind) for kind in kinds}
    assert any(before.values())
    assert shell.json("remerge", "demo")["action"] == "unchanged"
    assert shell.state().champion == champion
    assert {kind: store_keys(shell, kind) for kind in kinds} == before


def store_keys(shell: Shell, kind: str) -> list[str]:
    return list(shell.ledger().objects.store.list(f"keys/{kind}"))


def test_a_head_that_a_gpu_built_is_exported_on_a_cpu(
    shell: Shell, half_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line(shell, half_world, tmp_path)
    with monkeypatch.context() as on_gpu:
        on_gpu.setattr(Base, "compute_type", property(lambda _: "bfloat16"))
        task = half_world.task("colour")
        shell("register", "demo", "--task", task, "--model", half_world.model("colour"))
    shell("export", "demo", "champion", tmp_path / "out")
    assert (tmp_path / "out" / "heads" / "colour.safetensors").is_file()


def test_a_family_without_a_choice_of_types_computes_in_float32_only() -> None:
    family = Float32Only()
    check_compute(family, "auto")
    check_compute(family, "float32")
    with pytest.raises(BadInput, match="computes in float32 only"):
        check_compute(family, "bfloat16")


def test_a_line_with_a_type_that_its_family_cannot_load_is_refused(
    shell: Shell, half_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get_family.cache_clear()
    monkeypatch.setattr(TextEncoder, "load", Float32Only.load)
    file = half_world.line(tmp_path / "line.yaml", compute="bfloat16", retention=None)
    assert "computes in float32 only" in shell("init", file, code=3).err
