"""Text encoders: pooling, lengths, layouts and what of them is localizable."""

import json
import shutil
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, BertForSequenceClassification, T5EncoderModel

from restitch.merging.errors import BadInput
from restitch.modeling.data.rows import Example
from restitch.modeling.families.family import get_family
from restitch.modeling.families.text_encoder import TextEncoder
from restitch.registry.specs.head import HeadSpec
from tests.tiny_models import tiny_bert, tiny_roberta, tiny_t5

FAMILY = TextEncoder()


def example(*texts: str, label: int | None = None) -> Example:
    return Example(texts, label, "here")


def test_features_are_the_normalized_mean_over_the_text_s_own_tokens(bert):
    model: Any = FAMILY.load(bert)
    batch = FAMILY.preprocessor(bert)([example("short"), example("a much longer text")])
    features = FAMILY.features(model, batch)
    for row in range(2):
        length = int(batch["attention_mask"][row].sum())
        alone = {name: tensor[row : row + 1, :length] for name, tensor in batch.items()}
        hidden = model.inner(**alone).last_hidden_state[0]
        mean = hidden.mean(0)
        torch.testing.assert_close(features[row], mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_scores_are_scaled_cosines_with_the_label_embeddings(bert):
    model = FAMILY.load(bert)
    preprocess = FAMILY.preprocessor(bert)
    head = FAMILY.build_head(
        model, bert, HeadSpec(labels=("cat", "dog"), templates=("a {}", "the {}"), scale=7)
    )
    texts = [example(text) for text in ("a cat", "the cat", "a dog", "the dog")]
    prompts = FAMILY.features(model, preprocess(texts))
    means = torch.nn.functional.normalize(prompts.reshape(2, 2, -1).mean(1), dim=-1)
    torch.testing.assert_close(head.tensors["weight"], means, rtol=1e-4, atol=1e-5)
    batch = preprocess([example("x", label=0), example("y", label=1)])
    scores = FAMILY.logits(model, batch, head)
    cosines = FAMILY.features(model, batch) @ head.tensors["weight"].T
    torch.testing.assert_close(scores, 7 * cosines)
    expected = torch.nn.functional.cross_entropy(7 * cosines, torch.tensor([0, 1]))
    torch.testing.assert_close(FAMILY.loss(model, batch, head), expected)


def test_the_default_scale_is_twenty_and_is_recorded(bert):
    head = FAMILY.build_head(FAMILY.load(bert), bert, HeadSpec(labels=("a", "b")))
    assert head.spec == HeadSpec(labels=("a", "b"), scale=20.0, max_length=48)


def test_the_default_length_is_the_smaller_of_tokenizer_and_positions(bert, tmp_path):
    assert FAMILY.max_length(bert) == 48  # positions; the tokenizer allows 64
    config = json.loads((bert / "tokenizer_config.json").read_text())
    shutil.copytree(bert, tmp_path / "short")
    config["model_max_length"] = 10
    (tmp_path / "short" / "tokenizer_config.json").write_text(json.dumps(config))
    assert FAMILY.max_length(tmp_path / "short") == 10
    del config["model_max_length"]
    (tmp_path / "short" / "tokenizer_config.json").write_text(json.dumps(config))
    assert FAMILY.max_length(tmp_path / "short") == 48


def test_roberta_s_positions_start_after_its_padding_index(tmp_path):
    folder = tiny_roberta(tmp_path / "roberta")
    limit = FAMILY.max_length(folder)
    assert limit == 300 - 258 - 1
    model = FAMILY.load(folder)
    batch = FAMILY.preprocessor(folder)([example("x" * 500)])
    assert batch["input_ids"].shape == (1, limit)
    assert FAMILY.features(model, batch).isfinite().all()
    longer = FAMILY.preprocessor(folder, limit + 1)([example("x" * 500)])
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        FAMILY.features(model, longer)


def test_a_pair_is_one_sequence_cut_to_the_length(bert):
    preprocess = FAMILY.preprocessor(bert, 12)
    pair = preprocess([example("ab", "cd"), example("x" * 50, "y" * 50)])
    assert pair["input_ids"].shape == (2, 12)
    assert pair["attention_mask"].sum(1).tolist() == [7, 12]
    both, swapped = preprocess([example("ab", "cd"), example("cd", "ab")])["input_ids"].tolist()
    assert both == [both[0], *both[1:3], both[3], *swapped[1:3], both[3]]
    with pytest.raises(BadInput, match="too many input columns"):
        preprocess([example("a", "b", "c")])


LAYOUTS = {
    "bert": "encoder.layer.0.attention.self.query.weight",
    "prefixed bert": "bert.encoder.layer.11.output.dense.bias",
    "distilbert": "distilbert.transformer.layer.3.ffn.lin1.weight",
    "modernbert": "layers.0.attn.Wqkv.weight",
    "llama": "model.layers.2.mlp.up_proj.weight",
    "gpt2": "transformer.h.0.attn.c_attn.weight",
    "t5": "encoder.block.0.layer.0.SelfAttention.q.weight",
    "albert": "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight",
}
NEVER = (
    "embeddings.word_embeddings.weight",
    "bert.embeddings.LayerNorm.weight",
    "pooler.dense.weight",
    "bert.pooler.dense.bias",
    "classifier.dense.weight",
    "cls.predictions.transform.dense.weight",
    "lm_head.layer_norm.weight",
    "final_norm.weight",
    "model.norm.weight",
    "shared.weight",
    "wte.weight",
)


@pytest.mark.parametrize("name", LAYOUTS.values(), ids=LAYOUTS)
def test_the_blocks_of_every_layout_are_localizable(name):
    assert any(fnmatchcase(name, glob) for glob in FAMILY.localizable)


@pytest.mark.parametrize("name", NEVER)
def test_embeddings_poolers_and_heads_are_never_localizable(name):
    assert not any(fnmatchcase(name, glob) for glob in FAMILY.localizable)


def test_the_encoder_of_t5_gives_the_mean_of_its_own_hidden_states(tmp_path):
    folder = tiny_t5(tmp_path / "t5", encoder=True)
    model = FAMILY.load(folder)
    batch = FAMILY.preprocessor(folder)([example("a text")])
    hidden = T5EncoderModel.from_pretrained(folder)(**batch).last_hidden_state[0]
    expected = torch.nn.functional.normalize(hidden.mean(0), dim=-1)
    torch.testing.assert_close(FAMILY.features(model, batch)[0], expected)
    file = load_file(folder / "model.safetensors")
    assert set(FAMILY.parameters(model)) == set(file)


def test_t5_with_its_decoder_is_no_text_encoder(tmp_path):
    with pytest.raises(BadInput, match="is a model with a decoder"):
        FAMILY.load(tiny_t5(tmp_path / "t5"))


@pytest.mark.parametrize("head", [BertForMaskedLM, BertForSequenceClassification])
def test_an_encoder_with_a_head_loads_without_it(bert, tmp_path, head):
    folder = tmp_path / "head"
    shutil.copytree(bert, folder)
    head.from_pretrained(bert).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["architectures"] == [head.__name__]
    batch = FAMILY.preprocessor(bert)([example("a text")])
    one, two = (FAMILY.features(FAMILY.load(each), batch) for each in (bert, folder))
    assert torch.equal(one, two)


def old_name(name: str) -> str:
    return f"bert.{name.replace('LayerNorm.weight', 'LayerNorm.gamma')}"


def test_tensors_keep_the_names_of_the_file_with_any_prefix(bert, tmp_path):
    tensors = load_file(bert / "model.safetensors")
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    folder = tmp_path / "prefixed"
    shutil.copytree(bert, folder)
    # As version 4 saved a model with a head: prefixed, with an integer buffer and old norms.
    named = {
        f"bert.{n.replace('LayerNorm.weight', 'LayerNorm.gamma')}": t for n, t in tensors.items()
    }
    named["bert.embeddings.position_ids"] = torch.arange(48).unsqueeze(0)
    named["cls.predictions.bias"] = torch.zeros(3)
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    live = FAMILY.parameters(FAMILY.load(folder))
    assert len(live) >= len(expected)
    for name, tensor in expected.items():
        assert torch.equal(live[old_name(name)], tensor), name
    assert "cls.predictions.bias" not in live


def test_a_missing_tensor_is_listed(bert, tmp_path):
    tensors = load_file(bert / "model.safetensors")
    shutil.copytree(bert, tmp_path / "broken")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"lacks 1 tensors") as caught:
        FAMILY.load(tmp_path / "broken")
    assert caught.value.details == ("encoder.layer.1.output.dense.weight",)


def test_tensors_unknown_to_the_architecture_are_listed(bert, tmp_path):
    tensors = load_file(bert / "model.safetensors")
    shutil.copytree(bert, tmp_path / "deeper")
    tensors["encoder.layer.2.output.dense.weight"] = torch.zeros(16, 32)
    save_file(tensors, tmp_path / "deeper" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="that do not exist in the model") as caught:
        FAMILY.load(tmp_path / "deeper")
    assert caught.value.details == ("encoder.layer.2.output.dense.weight",)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_file_computes_in_float32(bert, tmp_path, dtype):
    tensors = {n: t.to(dtype) for n, t in load_file(bert / "model.safetensors").items()}
    shutil.copytree(bert, tmp_path / "half")
    save_file(tensors, tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
    live = FAMILY.parameters(FAMILY.load(tmp_path / "half"))
    assert all(torch.equal(live[n], tensors[n].float()) for n in tensors if "weight" in n)
    assert all(t.dtype == torch.float32 for t in live.values())


def test_code_in_the_folder_is_never_run(bert, tmp_path):
    folder = tmp_path / "custom"
    shutil.copytree(bert, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: ...\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Model", "AutoModel": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    FAMILY.load(folder)  # a known architecture loads as itself
    config["model_type"] = "evil"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="does not describe a known architecture"):
        FAMILY.load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["someone/kernel", "flash_attention_2", "sdpa"])
def test_a_configuration_never_chooses_the_attention_that_runs(bert, tmp_path, key, value):
    folder = tmp_path / "kernel"
    shutil.copytree(bert, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    model: Any = FAMILY.load(folder)
    assert model.inner.config._attn_implementation == "eager"
    assert FAMILY.config_differences(bert, folder) == []


def test_an_adapter_or_a_quantization_is_refused(bert, tmp_path):
    folder = tmp_path / "adapted"
    shutil.copytree(bert, folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(BadInput, match=r"has an adapter_config\.json"):
        FAMILY.load(folder)
    (folder / "adapter_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="cannot be loaded"):
        FAMILY.load(folder)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model_type": "t5"}', "{}"])
def test_a_configuration_that_cannot_be_used_is_an_error(bert, tmp_path, content):
    shutil.copytree(bert, tmp_path / "broken")
    (tmp_path / "broken" / "config.json").unlink()
    if content is not None:
        (tmp_path / "broken" / "config.json").write_text(content)
    with pytest.raises(BadInput):
        FAMILY.load(tmp_path / "broken")


def test_a_folder_without_a_tokenizer_is_an_error(bert, tmp_path):
    folder = tiny_bert(tmp_path / "bare")
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(BadInput, match="no tokenizer"):
        get_family("text-encoder").preprocessor(folder)
