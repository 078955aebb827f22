"""Backward passes with fewer activations give the same gradients; scores are in full precision."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from restitch.modeling.data.rows import Example
from restitch.modeling.families.clip import Clip
from restitch.modeling.families.family import Batch, Family
from restitch.modeling.families.text_encoder import TextEncoder
from restitch.modeling.gradients import checkpointed, precision, repeated_layers
from restitch.modeling.heads import Head
from restitch.registry.specs.head import HeadSpec


def text(folder: Path) -> tuple[Family, nn.Module, Batch, Head]:
    family: Any = TextEncoder()
    model = family.load(folder)
    rows = [Example((word,), place % 2, "here") for place, word in enumerate("abcd")]
    batch = family.preprocessor(folder)(rows)
    return family, model, batch, family.build_head(model, folder, HeadSpec(labels=("a", "b")))


def image(folder: Path) -> tuple[Family, nn.Module, Batch, Head]:
    family: Any = Clip()
    model = family.load(folder)
    colours = ("red", "blue", "green", "white")
    rows = [
        Example((Image.new("RGB", (40, 40), colour),), place % 2, "here")
        for place, colour in enumerate(colours)
    ]
    batch = family.preprocessor(folder)(rows)
    return family, model, batch, family.build_head(model, folder, HeadSpec(labels=("a", "b")))


def gradients(family: Family, model: nn.Module, batch: Batch, head: Head) -> dict[str, Tensor]:
    model.requires_grad_(True).zero_grad()
    torch.autograd.backward(family.loss(model, batch, head))
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("made", "name"), [(text, "bert"), (image, "clip")])
def test_fewer_activations_change_no_gradient(
    made: Any, name: str, request: pytest.FixtureRequest
) -> None:
    given = made(request.getfixturevalue(name))
    model = given[1]
    layers = repeated_layers(model)
    assert len(layers) >= 2
    wanted = gradients(*given)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    hooks = [next(layer.children()).register_forward_hook(count) for layer in layers]
    gradients(*given)
    once, calls = calls, 0
    with checkpointed(model):
        found = gradients(*given)
    for hook in hooks:
        hook.remove()
    # Of CLIP's two towers the loss goes through one.
    assert calls == 2 * once > 0, "once more for the backward pass"
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[each], found[each]) for each in wanted)
    assert not any("forward" in vars(layer) for layer in layers)


def test_scores_are_in_full_precision_also_under_autocast(bert: Path) -> None:
    family, model, batch, head = text(bert)
    with torch.no_grad():
        full = family.logits(model, batch, head)
        with torch.autocast("cpu", torch.bfloat16):
            short = family.logits(model, batch, head)
    assert short.dtype == torch.float32
    assert not torch.equal(short, full)
    torch.testing.assert_close(short, full, rtol=0, atol=0.02 * float(full.abs().max()))


def test_nothing_is_rounded_on_a_cpu() -> None:
    one = torch.rand(3, 3)
    with precision(torch.device("cpu")):
        assert (one @ one).dtype == torch.float32
