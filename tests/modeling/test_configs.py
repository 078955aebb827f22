"""Which differences between configurations keep a model out, and which do not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from restitch.merging.errors import BadInput
from restitch.modeling.configs import check_not_quantized, differences, unknown_keys
from restitch.modeling.families.causal_lm import CausalLm
from restitch.modeling.families.clip import Clip
from restitch.modeling.families.masked_lm import MaskedLm
from restitch.modeling.families.text_encoder import TextEncoder
from tests.tiny_models import tiny_roberta

FAMILY = TextEncoder()


@pytest.fixture
def changed(bert, tmp_path):
    """A copy of the tiny BERT with other configuration keys; None removes one."""

    def change(**changes: object) -> Path:
        folder: Path = tmp_path / f"changed{len(list(tmp_path.iterdir()))}"
        shutil.copytree(bert, folder)
        config = json.loads((folder / "config.json").read_text())
        for key, value in changes.items():
            config.pop(key, None)
            if value is not None:
                config[key] = value
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return change


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_dropout_prob": 0.9, "attention_probs_dropout_prob": 0.0},
        {"classifier_dropout": 0.3},
        {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}},
        {"problem_type": "single_label_classification"},
        {"initializer_range": 9.0},
        {"use_cache": False},
        {"output_attentions": True},
        {"architectures": ["BertForSequenceClassification"], "_name_or_path": "x"},
        {"dtype": "bfloat16", "transformers_version": "4.8.2"},
        {"torch_dtype": "float16"},
        {"gradient_checkpointing": False},
        {"position_embedding_type": "absolute"},
        {"layer_norm_eps": None},  # the default, which the base writes out
        {"tie_word_embeddings": False},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_keys_that_no_evaluation_reads_are_ignored(bert, changed, changes):
    assert FAMILY.config_differences(bert, changed(**changes)) == []
    assert FAMILY.config_differences(changed(**changes), bert) == []


@pytest.mark.parametrize(
    ("key", "value", "base"),
    [
        ("hidden_act", "relu", "'gelu'"),
        ("layer_norm_eps", 0.001, "1e-12"),
        ("num_attention_heads", 4, "2"),
        ("pad_token_id", 3, "258"),
        ("is_decoder", True, "False"),
        ("position_embedding_type", "relative_key", "'absolute'"),
    ],
)
def test_keys_that_change_the_forward_pass_are_listed(bert, changed, key, value, base):
    expected = f"{key}: base {base}, finetuned {value!r}"
    assert FAMILY.config_differences(bert, changed(**{key: value})) == [expected]


def test_all_differences_are_listed_sorted(bert, changed):
    found = FAMILY.config_differences(bert, changed(hidden_act="relu", pad_token_id=3))
    assert found == [
        "hidden_act: base 'gelu', finetuned 'relu'",
        "pad_token_id: base 258, finetuned 3",
    ]


def test_nested_keys_are_named_with_their_place():
    found = differences({"rope": {"theta": 1, "type": "x"}}, {"rope": {"theta": 2, "type": "x"}})
    assert found == ["rope.theta: base 1, finetuned 2"]


BOOKKEEPING = {
    "unsloth_version": "2026.1.4",
    "unsloth_fixed": True,
    "sentence_transformers": {"version": "5.0.0"},
    "transformers.js_config": {"dtype": "q8"},
    "best_metric": 0.94,
    "task_name": "trec",
}


def test_keys_that_the_architecture_does_not_know_are_named_and_do_not_count(bert, changed):
    tuned = changed(**BOOKKEEPING)
    assert FAMILY.config_differences(bert, tuned) == []
    assert FAMILY.config_differences(tuned, bert) == []
    assert unknown_keys(bert, tuned) == sorted(BOOKKEEPING)
    assert unknown_keys(tuned, tuned) == [], "the base has them too"
    assert unknown_keys(tuned, changed(**{**BOOKKEEPING, "best_metric": 0.5})) == ["best_metric"]
    assert unknown_keys(bert, bert) == []


def test_unknown_keys_do_not_hide_known_ones(bert, changed):
    found = FAMILY.config_differences(bert, changed(**BOOKKEEPING, hidden_act="relu"))
    assert found == ["hidden_act: base 'gelu', finetuned 'relu'"]


def test_unknown_keys_of_a_tower_are_named_with_their_place(clip, tmp_path):
    shutil.copytree(clip, tmp_path / "clip")
    config = json.loads((clip / "config.json").read_text())
    config["vision_config"]["tool_version"] = 3
    config["saved_by"] = "a tool"
    (tmp_path / "clip" / "config.json").write_text(json.dumps(config))
    assert Clip().config_differences(clip, tmp_path / "clip") == []
    assert unknown_keys(clip, tmp_path / "clip") == ["saved_by", "vision_config.tool_version"]


def test_another_architecture_is_reported_alone(bert, tmp_path):
    other = tiny_roberta(tmp_path / "roberta")
    assert FAMILY.config_differences(bert, other) == [
        "model_type: base 'bert', finetuned 'roberta'"
    ]


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "gptq"),
        ("quantization_config", {"bits": 4}, "bits"),
        ("compression_config", {"format": "int-quantized"}, "int-quantized"),
    ],
)
def test_a_configuration_of_quantized_weights_is_refused(changed, key, value, shown):
    with pytest.raises(BadInput, match="is quantized") as caught:
        check_not_quantized(changed(**{key: value}), "the model")
    assert f"{key}: " in caught.value.message()
    assert shown in caught.value.message()


@pytest.mark.parametrize("text", ["{", "[]", '{"quantization_config": null}'])
def test_a_configuration_without_quantization_is_not_refused_here(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    check_not_quantized(tmp_path, "the model")
    check_not_quantized(tmp_path / "nothing", "the model")


@pytest.mark.parametrize("family", [TextEncoder(), CausalLm(), MaskedLm()])
def test_files_that_write_the_same_need_no_transformers(
    changed: Any, monkeypatch: pytest.MonkeyPatch, family: Any
) -> None:
    base, same = changed(), changed(use_cache=False, transformers_version="9", vocab_size=1)
    other, untyped = changed(hidden_act="relu"), changed(model_type=None)
    with monkeypatch.context() as patch:
        patch.delattr("restitch.modeling.configs.read_config")
        assert family.config_differences(base, same) == unknown_keys(base, same) == []
        for folder in (other, untyped):
            with pytest.raises(NameError):
                family.config_differences(base, folder)
    assert family.config_differences(base, other) == ["hidden_act: base 'gelu', finetuned 'relu'"]
