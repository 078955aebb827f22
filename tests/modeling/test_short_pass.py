"""A short pass counts what the whole model has, and times a row of every kind of model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, CLIPVisionModel

from restitch.modeling import short_pass as module
from restitch.modeling.short_pass import short_pass
from tests.tiny_models import tiny_clip, tiny_decoder, tiny_masked, tiny_seq2seq

KINDS: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "clip": (tiny_clip, {"layers": 3}),
    "roberta": (tiny_masked, {}),
    "gpt2": (tiny_decoder, {"kind": "gpt2"}),
    "llama": (tiny_decoder, {}),
    "t5": (tiny_seq2seq, {"kind": "flan-t5"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_configuration_alone_is_enough(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SECONDS", 0.0)
    make, settings = KINDS[kind]
    folder = make(tmp_path / "model", **settings)
    read = CLIPVisionModel if kind == "clip" else AutoModel
    whole = sum(tensor.numel() for tensor in read.from_pretrained(folder).parameters())
    (folder / "model.safetensors").unlink()
    found = short_pass(folder, "image" if kind == "clip" else "text", torch.device("cpu"))
    assert found.parameters == whole
    assert found.row > 0
    assert found.rows == 16
    assert (found.squared_inputs > 0) == (found.squared_outputs > 0) == (kind != "gpt2")
    assert ("photo" in found.what) == (kind == "clip")


def test_two_layers_are_scaled_to_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by a second with each call."""
    monkeypatch.setattr(module, "_SECONDS", 0.0)
    ticks = iter(range(1000))
    monkeypatch.setattr("restitch.modeling.short_pass.time.perf_counter", lambda: next(ticks))
    found = short_pass(tiny_masked(tmp_path / "two"), "text", torch.device("cpu"))
    seconds = found.row * found.rows
    monkeypatch.setattr(module, "_LAYERS", 1)
    one = short_pass(tmp_path / "two", "text", torch.device("cpu"))
    assert one.row * one.rows == pytest.approx(2 * seconds)
