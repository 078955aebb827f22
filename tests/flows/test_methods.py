"""Lines whose method merges whole task vectors, up to the bytes of the export."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import NewHome
from tests.shell import Shell
from tests.worlds import SKILLS, World

pytestmark = pytest.mark.usefixtures("without_mlflow")


def made(shell: Shell, world: World, file: Path, method: Any, *tasks: str) -> Shell:
    shell("init", world.line(file, method=method, localize=None, retention=None))
    for task in tasks:
        shell.add(world, task)
    return shell


def exported(shell: Shell, out: Path) -> dict[str, torch.Tensor]:
    shell("export", "demo", "champion", out)
    weights: dict[str, torch.Tensor] = load_file(out / "model.safetensors")
    return weights


def localizable(world: World, shell: Shell) -> tuple[str, ...]:
    """The tensors that the members' deltas have."""
    from restitch.merging.files.sparse import SparseFile

    ledger = shell.ledger()
    delta = shell.state().tasks["colour"].versions[1].delta
    assert delta is not None
    return SparseFile.open(ledger.objects.blob_path(delta)).names


def test_a_line_without_localize_keeps_whole_task_vectors(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    made(shell, world, tmp_path / "line.yaml", "task-arithmetic", "colour")
    spec = shell.state().spec
    assert (spec.localize.mode, spec.localize.density) == ("dataless", 1.0)
    assert spec.method.settings == {"alpha": 0.4}
    facts = shell.state().tasks["colour"].versions[1].facts
    assert facts.density == 1.0
    assert facts.kept == facts.coordinates


def test_the_exported_weights_equal_the_formula(world: World, shell: Shell, tmp_path: Path) -> None:
    method = {"name": "task-arithmetic", "settings": {"alpha": 0.5}}
    made(shell, world, tmp_path / "line.yaml", method, *SKILLS)
    base = load_file(world.base / "model.safetensors")
    models = [load_file(world.model(task) / "model.safetensors") for task in sorted(SKILLS)]
    chosen, found = localizable(world, shell), exported(shell, tmp_path / "out")
    for name, before in base.items():
        if name in chosen:
            change = sum(model[name].double() - before.double() for model in models)
            assert torch.equal(found[name], (before.double() + 0.5 * change).float())
        else:
            assert torch.equal(found[name], before)


@pytest.mark.parametrize("method", ["ties", "consensus-ta"])
def test_the_order_of_joining_does_not_matter_and_a_retired_model_leaves_no_trace(
    world: World, new_home: NewHome, tmp_path: Path, method: str
) -> None:
    bytes_found = set()
    for index, order in enumerate(itertools.islice(itertools.permutations(SKILLS), 0, 6, 3)):
        shell = made(new_home(f"h{index}"), world, tmp_path / "line.yaml", method, *order)
        bytes_found.add(shell.patch_bytes())
    assert len(bytes_found) == 1
    assert shell.json("verify", "demo")["intact"]
    shell("retire", "demo", "number", "--reason", "withdrawn")
    fresh = made(new_home("fresh"), world, tmp_path / "line.yaml", method, "animal", "colour")
    assert shell.patch_bytes() == fresh.patch_bytes()


def test_a_numeric_version_is_rebuilt_exactly_only_with_the_same_torch(
    world: World, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(shell, world, tmp_path / "line.yaml", "tsv-m", "colour", "number")
    found = shell.json("verify", "demo", "--version", 2)
    assert (found["intact"], found["rebuilt"]) == (True, [2])
    record = shell.ledger().objects.lookup("patch", shell.ledger().merged(2).recipe_digest)
    assert record is not None
    assert record.fingerprint == {
        "torch": torch.__version__,
        "device": "cpu",
        "threads": torch.get_num_threads(),
    }
    # The same with another torch, whose singular vectors have other last bits.
    plain, other = torch.linalg.svd, {**record.fingerprint, "torch": "9.9"}
    monkeypatch.setattr(torch.linalg, "svd", lambda m, **o: plain(m + 1e-7 * m.abs().max(), **o))
    monkeypatch.setattr("restitch.tasks.merge.fingerprint", lambda _device: other)
    found = shell.json("verify", "demo", "--version", 2)
    assert (found["intact"], found["rebuilt"]) == (True, [])
    (note,) = [one["text"] for one in found["findings"] if one["subject"] == "version 2"]
    assert "another torch, device or number of threads" in note
    apart = float(note.rpartition("by at most ")[2].split()[0])
    assert 0 < apart < 1e-3
    # With the torch that made it, other bytes are damage.
    monkeypatch.setattr("restitch.tasks.merge.fingerprint", lambda _device: record.fingerprint)
    assert not shell.json("verify", "demo", "--version", 2, code=7)["intact"]


def test_sparse_deltas_are_refused_for_methods_that_need_whole_task_vectors(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    file = world.line(tmp_path / "line.yaml", method="ties", localize={"density": 0.05})
    done = shell("init", file, code=3)
    assert "needs whole task vectors" in done.err
    assert "localize-and-stitch" in done.err
    assert shell.head_bytes() is None


def test_changing_the_method_of_a_line_localizes_its_members_again(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    file = world.line(tmp_path / "line.yaml", retention=None)
    shell("init", file)
    shell.add(world, "colour")
    shell.add(world, "number")
    sparse = shell.patch_bytes()
    made(shell, world, tmp_path / "line.yaml", "averaging")
    shell("remerge", "demo")
    assert shell.patch_bytes() != sparse
    line_state = shell.state()
    assert {t.versions[1].facts.density for t in line_state.tasks.values()} == {1.0}
    base, found = load_file(world.base / "model.safetensors"), exported(shell, tmp_path / "out")
    models = [load_file(world.model(task) / "model.safetensors") for task in ("colour", "number")]
    for name in localizable(world, shell):
        mean = sum(m[name].double() - base[name].double() for m in models) / 2
        assert torch.equal(found[name], (base[name].double() + mean).float())
