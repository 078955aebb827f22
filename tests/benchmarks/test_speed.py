import subprocess
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import speed
from restitch.merging.files.checkpoint import Checkpoint


def test_the_full_model_is_a_llama_of_1_1_billion_weights() -> None:
    shapes = speed.llama_shapes(1.1e9)
    assert speed.count(shapes) == pytest.approx(1.1e9, rel=0.001)
    assert "model.layers.21.mlp.down_proj.weight" in shapes
    assert "model.layers.22.mlp.down_proj.weight" not in shapes


def test_everything_is_measured_on_a_small_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"HIDDEN": 64, "INTERMEDIATE": 128, "KV": 16, "VOCABULARY": 300}
    for name, size in sizes.items():
        monkeypatch.setattr(speed, name, size)
    # The processes that measure memory take seconds to start and are not the claim here.
    monkeypatch.setattr(speed, "peak_memory", lambda _action, _folder: 5_000_000)
    console = Console(file=(tmp_path / "log").open("w"))
    figures = {figure.name: figure for figure in speed.measure(tmp_path, 3e5, 1, console)}
    assert all(figure.value > 0 for figure in figures.values())
    delta = figures["fp32 delta at 1 %, MiniLM"]
    assert delta.limit is not None
    assert delta.value <= delta.limit
    assert figures["private memory of the mask"].value == 0.005
    speed.show(list(figures.values()), console)


def test_the_reference_copy_is_a_copy(tmp_path: Path) -> None:
    speed.make_models(tmp_path, {"a.weight": (40, 30)}, ("one",), torch.bfloat16)
    speed.copy(tmp_path)
    subprocess.run(["diff", "-r", tmp_path / "base", tmp_path / "out"], check=True)
    base, one = Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "one")
    assert base.digest() != one.digest()
