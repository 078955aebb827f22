"""Parameters that transformers joins: their pieces against the whole, and what is refused."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from restitch.merging.errors import BadInput
from restitch.merging.statistics.grams import gram_forms, measure_grams, packed
from restitch.modeling import pretrained
from restitch.modeling.families.family import get_family
from restitch.modeling.gradients import checkpointed
from restitch.modeling.pretrained import NamedModel
from restitch.modeling.weights import linear_layers
from tests.tiny_models import decoder_of, tiny_experts

FAMILY = get_family("causal-lm")
IDS = torch.arange(24).reshape(2, 12)
DEEPSEEK = {
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}


def made(folder: Path, kind: str) -> Path:
    if kind == "deepseek_v3":
        return decoder_of(folder, kind, **DEEPSEEK)
    return tiny_experts(folder, kind)


def loss(model: NamedModel) -> Tensor:
    found: Tensor = model.inner(IDS, labels=IDS, use_cache=False).loss
    return found


def slope(live: Tensor) -> Tensor:
    """The gradient of a live tensor."""
    assert live.grad is not None
    return live.grad


def loaded(folder: Path) -> NamedModel:
    return NamedModel.of(FAMILY.load(folder))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_experts(tmp_path_factory.mktemp("mixtral") / "base")


def changed(folder: Path, to: Path, weights: dict[str, Tensor]) -> Path:
    shutil.copytree(folder, to)
    save_file(weights, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"])
def test_gradients_of_pieces_are_the_pieces_of_the_whole_gradient(
    tmp_path: Path, kind: str
) -> None:
    model = loaded(made(tmp_path / "base", kind))
    live = model.tensors()
    wholes = [each.whole.requires_grad_() for each in model.joined]
    whole = torch.autograd.grad(loss(model), wholes)
    for each in wholes:
        each.requires_grad_(False)
    expected = {
        name: part
        for joined, gradient in zip(model.joined, whole, strict=True)
        for name, part in joined.split(gradient).items()
    }
    assert len(expected) >= 12, "four experts with three matrices"
    for name in expected:
        live[name].requires_grad_()
    torch.autograd.backward(loss(model))
    for name, gradient in expected.items():
        assert torch.equal(slope(live[name]), gradient), name
    with checkpointed(model):
        found = torch.autograd.grad(loss(model), [live[name] for name in expected])
    for name, gradient in zip(expected, found, strict=True):
        assert torch.allclose(gradient, expected[name], atol=1e-7), name


def test_one_piece_alone_can_require_gradients(mixtral: Path) -> None:
    model = loaded(mixtral)
    name, piece = list(model.joined[0].pieces().items())[1]
    piece.requires_grad_()
    torch.autograd.backward(loss(model))
    assert slope(piece).shape == piece.shape
    others = [live for own, live in model.tensors().items() if own != name]
    assert all(live.grad is None for live in others)
    with torch.no_grad():
        before = loss(model)
        piece.add_(1)
        assert loss(model) != before, "the model reads what was written to a piece"


def test_an_expert_that_no_token_reaches_has_a_gradient_of_zero(mixtral: Path) -> None:
    model = loaded(mixtral)
    live = model.tensors()
    with torch.no_grad():
        for layer in model.inner.model.layers:
            layer.mlp.gate.weight.zero_()  # all tokens choose the same two experts
    names = [name for name in live if ".experts." in name]
    for name in names:
        live[name].requires_grad_()
    torch.autograd.backward(loss(model))
    reached = {name.split(".experts.")[1][0] for name in names if slope(live[name]).any()}
    assert len(reached) == 2
    assert all(slope(live[name]).isfinite().all() for name in names)


def grams_of(model: NamedModel) -> dict[str, Tensor]:
    """The packed Gram matrices of the experts that a row reaches."""
    found = linear_layers(model, model.tensors())
    layers = {name: layer for name, layer in found.items() if ".experts." in name}
    forms = gram_forms(layers)
    grams = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in forms.items()}

    def run(rows: Sequence[int], stored: Callable[[], None]) -> None:
        for row in rows:
            model.inner(IDS[row : row + 1], use_cache=False)

    return {name: grams[name] for name in measure_grams(layers, len(IDS), run, grams)}


@pytest.mark.parametrize("kind", ["grouped_mm", "eager"])
def test_inputs_of_experts_are_those_of_the_tokens_that_choose_them(
    mixtral: Path, kind: str
) -> None:
    model = loaded(mixtral)
    calls: list[tuple[str, Any, Any]] = []
    for number, block in enumerate(model.inner.model.layers):
        block.mlp.experts.register_forward_pre_hook(
            lambda module, args, number=number: calls.append((str(number), module, args))
        )
    model.inner.set_experts_implementation(kind)
    found = grams_of(model)
    inputs: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for layer, experts, (states, chosen, _) in calls:
            for expert in range(4):
                own = states[(chosen == expert).any(1)]
                if len(own):
                    gate, up = (own @ experts.gate_up_proj[expert].T).chunk(2, 1)
                    name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
                    for part, value in (
                        ("w1", own),
                        ("w3", own),
                        ("w2", experts.act_fn(gate) * up),
                    ):
                        inputs.setdefault(f"{name}{part}.weight", []).append(value)
    assert found.keys() == inputs.keys()
    for name, values in inputs.items():
        rows = torch.cat(values)
        expected = packed(rows.T @ rows / len(rows))
        assert torch.allclose(found[name], expected, rtol=1e-4, atol=1e-5), name


def test_an_expert_that_no_token_reaches_has_no_gram_matrix(mixtral: Path) -> None:
    model = loaded(mixtral)
    for layer in model.inner.model.layers:
        layer.mlp.gate.weight.data.zero_()  # all tokens choose the same two experts
    found = grams_of(model)
    assert len(found) == 2 * 2 * 3, "layers, experts and matrices"
    assert all(gram.isfinite().all() for gram in found.values())


def test_a_model_that_moves_has_new_pieces(mixtral: Path) -> None:
    model = loaded(mixtral)
    before = model.tensors()
    assert all(live is before[name] for name, live in model.tensors().items())
    model.to(torch.bfloat16)
    name = next(iter(model.joined[0].pieces()))
    assert model.tensors()[name].dtype == torch.bfloat16


def test_a_file_of_joined_tensors_has_them_as_they_are(mixtral: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(mixtral)
    joined = shutil.copytree(mixtral, tmp_path / "joined")
    (joined / "model.safetensors").unlink()
    model.save_pretrained(joined, save_original_format=False)
    for empty in (False, True):
        found = NamedModel.of(FAMILY.load(joined, empty=empty))
        assert not found.joined
        assert found.tensors().keys() == load_file(joined / "model.safetensors").keys()
    assert torch.equal(loss(loaded(joined)), loss(loaded(mixtral)))


def test_a_file_that_lacks_a_piece_is_refused(mixtral: Path, tmp_path: Path) -> None:
    weights = load_file(mixtral / "model.safetensors")
    for name in [name for name in weights if ".0." in name and ".experts.3.w2" in name]:
        del weights[name]
    folder = changed(mixtral, tmp_path / "lacking", weights)
    for empty in (False, True):
        with pytest.raises(BadInput):
            FAMILY.load(folder, empty=empty)


def test_weights_that_are_computed_otherwise_are_refused_with_what_to_do(
    mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing: dict[str, Any] = {}
    monkeypatch.setattr(pretrained, "pieces_of", lambda _: nothing)
    with pytest.raises(BadInput, match="transformers computes weights of it") as error:
        FAMILY.load(mixtral)
    assert "save_original_format=False" in str(error.value)
    assert json.loads((mixtral / "config.json").read_text())["model_type"] in str(error.value)


def test_layers_that_transformers_leaves_out_are_refused_with_what_to_do(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As GLM and DeepSeek have them, to predict several tokens."""
    monkeypatch.setattr(
        MixtralForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.9.*"]
    )
    weights = load_file(mixtral / "model.safetensors")
    more = {"model.layers.9.eh_proj.weight": torch.ones(2, 2)}
    folder = changed(mixtral, tmp_path / "more", weights | more)
    with pytest.raises(BadInput, match="tensors that transformers does not load") as error:
        FAMILY.load(folder)
    assert "model.layers.9.eh_proj.weight" in str(error.value)
