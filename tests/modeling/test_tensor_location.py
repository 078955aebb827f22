"""Places of tensors in the layouts that transformers has, and that nothing falls out."""

from collections import Counter

import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    CLIPConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    MPNetConfig,
    RobertaConfig,
    ViTConfig,
)

from restitch.modeling.tensor_location import COMPONENTS, Place, place_of

SMALL = {
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 1,
    "intermediate_size": 8,
}
# Counts in each block of (layer norm, attention, mlp, bias), biases of norms with the norms.
CONFIGS = {
    "bert": (BertConfig(**SMALL), (4, 4, 2, 6)),
    "roberta": (RobertaConfig(**SMALL), (4, 4, 2, 6)),
    "mpnet": (MPNetConfig(**SMALL), (4, 4, 2, 6)),
    "distilbert": (DistilBertConfig(dim=8, n_layers=3, n_heads=1, hidden_dim=8), (4, 4, 2, 6)),
    "vit": (ViTConfig(**SMALL), (4, 4, 2, 6)),
    "gpt2": (GPT2Config(n_embd=8, n_layer=3, n_head=1), (4, 2, 2, 4)),
    "llama": (LlamaConfig(**SMALL, num_key_value_heads=1), (2, 4, 3, 0)),
}


def names(config) -> list[str]:
    with torch.device("meta"):
        return list(AutoModel.from_config(config).state_dict())


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_tensor_of_a_block_has_its_layer_and_its_component(kind: str) -> None:
    config, expected = CONFIGS[kind]
    places = [place_of(name) for name in names(config)]
    for layer in range(3):
        found = Counter(p.component for p in places if p.layer == layer)
        assert tuple(found[c] for c in COMPONENTS[:4]) == expected
        assert found.total() == sum(expected), "nothing in a block is `embedding` or `other`"
    assert {p.layer for p in places} == {0, 1, 2, None}
    outside = {p.component for p in places if p.layer is None}
    assert outside <= {"layer norm", "embedding", "other", "attention"}
    assert {p.tower for p in places} == {None}


def test_clip_has_two_towers_with_the_same_components() -> None:
    config = CLIPConfig(text_config=SMALL, vision_config=SMALL)
    places = [place_of(name) for name in names(config)]
    for tower in ("vision", "text"):
        inside = [p for p in places if p.tower == tower and p.layer is not None]
        assert Counter(p.component for p in inside) == {
            "layer norm": 12,
            "attention": 12,
            "mlp": 6,
            "bias": 18,
        }
    assert place_of("logit_scale") == Place(None, "other")
    assert place_of("vision_model.pre_layrnorm.weight") == Place(None, "layer norm", "vision")
    assert place_of("visual_projection.weight") == Place(None, "other", "vision")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("bert.encoder.layer.11.attention.self.query.weight", Place(11, "attention")),
        ("bert.encoder.layer.11.attention.output.dense.bias", Place(11, "bias")),
        ("bert.encoder.layer.0.attention.output.LayerNorm.bias", Place(0, "layer norm")),
        ("encoder.layer.0.output.dense.weight", Place(0, "mlp")),
        ("encoder.layer.0.LayerNorm.gamma", Place(0, "layer norm")),
        ("embeddings.LayerNorm.bias", Place(None, "layer norm")),
        ("embeddings.cls_token", Place(None, "embedding")),
        ("embeddings.patch_embeddings.projection.bias", Place(None, "embedding")),
        ("encoder.relative_attention_bias.weight", Place(None, "attention")),
        ("pooler.dense.bias", Place(None, "other")),
        ("encoder.block.3.layer.1.DenseReluDense.wi.weight", Place(3, "mlp")),
        ("encoder.block.3.layer.0.SelfAttention.q.weight", Place(3, "attention")),
        ("encoder.block.3.layer.0.layer_norm.weight", Place(3, "layer norm")),
        (
            "encoder.albert_layer_groups.0.albert_layers.0.ffn_output.bias",
            Place(0, "bias"),
        ),
        ("model.layers.5.mlp.experts.7.down_proj.weight", Place(5, "mlp")),
        ("model.layers.5.block_sparse_moe.experts.7.w2.weight", Place(5, "mlp")),
        ("visual.transformer.resblocks.2.attn.in_proj_bias", Place(2, "bias", "vision")),
        ("model.layers.5.self_attn.q_norm.weight", Place(5, "layer norm")),
        ("layers.x.weight", Place(None, "other")),
        ("", Place(None, "other")),
    ],
)
def test_names_one_by_one(name: str, place: Place) -> None:
    assert place_of(name) == place
