"""Which differences between configurations keep a model out, and which do not."""

import json
import shutil
from pathlib import Path

import pytest

from restitch.modeling.configs import differences
from restitch.modeling.families.text_encoder import TextEncoder

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
        ("something_new", 7, "None"),
    ],
)
def test_keys_that_change_the_forward_pass_are_listed(bert, changed, key, value, base):
    expected = f"{key}: base {base}, finetuned {value!r}"
    assert FAMILY.config_differences(bert, changed(**{key: value})) == [expected]


def test_all_differences_are_listed_sorted(bert, changed):
    found = FAMILY.config_differences(bert, changed(hidden_act="relu", vocab_size=3))
    assert found == [
        "hidden_act: base 'gelu', finetuned 'relu'",
        "vocab_size: base 260, finetuned 3",
    ]


def test_nested_keys_are_named_with_their_place():
    found = differences({"rope": {"theta": 1, "type": "x"}}, {"rope": {"theta": 2, "type": "x"}})
    assert found == ["rope.theta: base 1, finetuned 2"]
