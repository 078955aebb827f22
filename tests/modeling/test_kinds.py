"""Kinds of models, read from the configuration and from what transformers maps it to."""

import json
from pathlib import Path
from typing import Any

import pytest

from restitch.modeling import kinds
from restitch.modeling.configs import read_config, vocabulary_size
from restitch.modeling.kinds import Kind, model_kind
from restitch.modeling.remembered import remembering

TINY: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 99,
}


def kind_of(folder: Path, model_type: str, architecture: str | None = None, **keys: object) -> Kind:
    folder.mkdir(exist_ok=True)
    named = {} if architecture is None else {"architectures": [architecture]}
    config = {"model_type": model_type, **named, **keys}
    (folder / "config.json").write_text(json.dumps(config))
    return model_kind(folder).kind


ENCODERS = [
    ("bert", "BertModel", {}),
    ("bert", "BertForMaskedLM", {}),
    ("bert", "BertForPreTraining", {}),
    ("bert", "BertForSequenceClassification", {}),
    ("roberta", "RobertaForMaskedLM", {}),
    ("xlm-roberta", "XLMRobertaForTokenClassification", {}),
    ("distilbert", None, {"n_layers": 1}),
    ("mpnet", "MPNetModel", {}),
    ("deberta-v2", "DebertaV2ForSequenceClassification", {}),
    ("modernbert", "ModernBertForMaskedLM", {}),
    ("bert", "ClassOfSomebodyElse", {}),
    ("dpr", "DPRQuestionEncoder", {}),
    ("canine", "CanineModel", {}),
    ("splinter", "SplinterModel", {}),
    ("xlnet", "XLNetModel", {"n_layer": 1, "d_head": 8}),
    ("bert-generation", "BertGenerationEncoder", {}),
    ("t5", "T5EncoderModel", {"num_layers": 1}),
    ("gemma3_text", "Gemma3TextModel", {"use_bidirectional_attention": True, "head_dim": 8}),
]
DECODERS = [
    ("gpt2", "GPT2LMHeadModel", {"n_layer": 1}),
    ("gpt2", "GPT2ForSequenceClassification", {"n_layer": 1}),
    ("gpt2", None, {"n_layer": 1}),
    ("llama", "LlamaForCausalLM", {}),
    ("llama", "LlamaModel", {}),
    ("qwen2", "Qwen2ForSequenceClassification", {}),
    ("bloom", "BloomForCausalLM", {"n_layer": 1}),
    ("mamba", "MambaForCausalLM", {}),
    ("gemma3_text", "Gemma3ForCausalLM", {"head_dim": 8}),
    ("modernbert-decoder", "ModernBertDecoderForCausalLM", {}),
    ("bert", "BertModel", {"is_decoder": True}),
    ("bert", "BertLMHeadModel", {"is_decoder": True}),
    ("bert-generation", "BertGenerationDecoder", {"is_decoder": True}),
    ("qwen2_vl_text", "Qwen2VLTextModel", {}),
]
OTHERS = [
    ("t5", "T5ForConditionalGeneration", Kind.SEQ2SEQ_LM),
    ("t5", None, Kind.SEQ2SEQ_LM),
    ("bart", "BartForSequenceClassification", Kind.SEQ2SEQ_LM),
    ("marian", "MarianMTModel", Kind.SEQ2SEQ_LM),
    ("clip", "CLIPModel", Kind.IMAGE_TEXT),
    ("siglip", "SiglipModel", Kind.IMAGE_TEXT),
    ("siglip2", "Siglip2Model", Kind.IMAGE_TEXT),
    ("chinese_clip", "ChineseCLIPModel", Kind.IMAGE_TEXT),
    ("clip", "CLIPForImageClassification", Kind.IMAGE),
    ("clip_vision_model", "CLIPVisionModel", Kind.IMAGE),
    ("siglip_vision_model", "SiglipVisionModel", Kind.IMAGE),
    ("vit", "ViTForImageClassification", Kind.IMAGE),
    ("vit", "ViTModel", Kind.IMAGE),
    ("dinov2", "Dinov2Model", Kind.IMAGE),
    ("convnext", "ConvNextModel", Kind.IMAGE),
    ("cvt", "CvtModel", Kind.IMAGE),
    ("llava", "LlavaForConditionalGeneration", Kind.MULTIMODAL),
    ("whisper", "WhisperForConditionalGeneration", Kind.AUDIO),
    ("wav2vec2", "Wav2Vec2ForCTC", Kind.AUDIO),
    ("vits", "VitsModel", Kind.AUDIO),
]


@pytest.mark.parametrize(("model_type", "architecture", "keys"), ENCODERS)
def test_text_encoders_of_all_architectures_and_heads(tmp_path, model_type, architecture, keys):
    assert kind_of(tmp_path, model_type, architecture, **(TINY | keys)) is Kind.TEXT_ENCODER


@pytest.mark.parametrize(("model_type", "architecture", "keys"), DECODERS)
def test_decoders_of_all_architectures_and_heads(tmp_path, model_type, architecture, keys):
    assert kind_of(tmp_path, model_type, architecture, **(TINY | keys)) is Kind.CAUSAL_LM


@pytest.mark.parametrize(("model_type", "architecture", "kind"), OTHERS)
def test_kinds_without_texts_alone_or_with_two_halves(tmp_path, model_type, architecture, kind):
    assert kind_of(tmp_path, model_type, architecture) is kind


def test_an_architecture_of_another_model_type_says_nothing(tmp_path):
    assert kind_of(tmp_path, "bert", "GPT2LMHeadModel", **TINY) is Kind.TEXT_ENCODER


@pytest.mark.parametrize("named", [None, [], "BertModel", [None], [7], ["pipeline"], ["../x"]])
def test_architectures_of_any_form_are_no_error(tmp_path, named):
    kind_of(tmp_path, "bert", **TINY)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": named}))
    assert model_kind(tmp_path).kind is Kind.TEXT_ENCODER


def test_a_configuration_with_endless_layers_is_not_built(tmp_path):
    keys = TINY | {"num_hidden_layers": 10**9}
    assert kind_of(tmp_path, "llama", "LlamaForCausalLM", **keys) is Kind.CAUSAL_LM


def test_the_evidence_is_named(tmp_path):
    kind_of(tmp_path, "bert", "BertForMaskedLM", **TINY)
    text = str(model_kind(tmp_path))
    assert text == "BertForMaskedLM (model_type 'bert'), a text encoder"


def test_an_answer_is_kept_for_the_same_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, answers = tmp_path / "model", tmp_path / "answers"
    bert, saved_again = ("bert", "BertModel"), {"transformers_version": "9", **TINY}
    with remembering(answers):
        assert kind_of(model, *bert, **TINY) is Kind.TEXT_ENCODER
        assert vocabulary_size(model) == 99
    asked = 0

    def read(folder: Path) -> Any:
        nonlocal asked
        asked += 1
        return read_config(folder)

    monkeypatch.setattr(kinds, "read_config", read)
    monkeypatch.setattr("restitch.modeling.configs.read_config", read)
    with remembering(answers):
        assert kind_of(model, *bert, **saved_again) is Kind.TEXT_ENCODER
        assert (vocabulary_size(model), asked) == (99, 0)
        assert kind_of(model, "gpt2", "GPT2Model", n_layer=1) is Kind.CAUSAL_LM
        assert vocabulary_size(model) == 50257
        for file in answers.iterdir():
            file.write_text("{")
        before = asked
        assert kind_of(model, *bert, **TINY) is Kind.TEXT_ENCODER
        assert asked > before
    before = asked
    assert kind_of(model, *bert, **TINY) is Kind.TEXT_ENCODER
    assert asked > before


def test_a_kind_that_a_missing_package_may_hide_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, bert = tmp_path / "model", ("bert", "BertForPreTraining")
    with remembering(tmp_path / "answers"):
        with monkeypatch.context() as patch:
            patch.setattr(kinds, "_model_class", lambda config: None)
            assert kind_of(model, *bert, hidden_size=12) is Kind.OTHER
        kinds._model_kind.cache_clear()
        assert kind_of(model, *bert, hidden_size=12) is Kind.TEXT_ENCODER
