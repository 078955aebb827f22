"""Text classifiers: heads of finetuned models on every architecture, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    BertForTokenClassification,
)

from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import Checkpoint
from restitch.modeling.data.rows import Example
from restitch.modeling.families.text_classifier import TextClassifier
from restitch.modeling.family_choice import check_base, proposal
from restitch.modeling.kinds import model_kind
from restitch.registry.specs.head import HeadSpec
from tests.modeling.family_contract import FamilyContract
from tests.tiny_models import tiny_classifier, tiny_decoder, tiny_encoder, tiny_t5

FAMILY = TextClassifier()
HEADS = FAMILY.task_heads
LABELS = ("no", "yes", "maybe")
SPEC = HeadSpec(labels=LABELS)
TEXTS = ["one", "a longer text than the others", "two words", "?", "naïve", "yes or no"]
KINDS = (
    "bert", "roberta", "distilbert", "deberta-v2", "mpnet", "electra", "albert", "modernbert",
    "xlnet",
)  # fmt: skip


class TestContract(FamilyContract):
    @pytest.fixture
    def family(self):
        return FAMILY

    @pytest.fixture
    def base(self, tmp_path):
        return tiny_encoder(tmp_path / "base")

    @pytest.fixture
    def finetuned(self, tmp_path, base):
        return tiny_classifier(base, tmp_path / "tuned", self.spec.classes)

    @pytest.fixture
    def values(self):
        return TEXTS


class TestContractOfBaseWithMaskedLanguageHead(TestContract):
    @pytest.fixture
    def base(self, tmp_path):
        folder = tiny_encoder(tmp_path / "base")
        BertForMaskedLM.from_pretrained(folder).save_pretrained(folder)
        return folder


class TestContractOfRoberta(TestContract):
    @pytest.fixture
    def base(self, tmp_path):
        return tiny_encoder(tmp_path / "base", "roberta")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_classifier(base, tmp_path_factory.mktemp("tuned") / "tuned", LABELS)


def changed(folder: Path, target: Path, **config: Any) -> Path:
    """A copy of a model with other keys in its configuration."""
    shutil.copytree(folder, target)
    values = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**values, **config}))
    return target


def scores(body: Path, head_of: Path, base: Path, labels: tuple[str, ...] = LABELS) -> Any:
    """The scores of the texts with the body of one model and the head of another."""
    head = FAMILY.build_head(FAMILY.load(base), base, HeadSpec(labels=labels), finetuned=head_of)
    batch = FAMILY.preprocessor(base)([Example((text,), None, "") for text in TEXTS])
    return FAMILY.logits(FAMILY.load(body), batch, head)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_model_in_transformers(tmp_path: Path, kind: str) -> None:
    base = tiny_encoder(tmp_path / "base", kind)
    tuned = tiny_classifier(base, tmp_path / "tuned", LABELS)
    assert FAMILY.lacks(base) is None
    assert FAMILY.config_differences(base, tuned) == []
    model = AutoModelForSequenceClassification.from_pretrained(tuned)
    inputs = AutoTokenizer.from_pretrained(base)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(scores(tuned, tuned, base), expected, rtol=1e-4, atol=1e-4)
    body = FAMILY.parameters(FAMILY.load(base))
    assert not any("pooler" in name or "classifier" in name for name in body)
    heads = HEADS.tensors(tuned, Checkpoint.open(tuned).names)
    assert {n for n in Checkpoint.open(tuned).names if "pooler" in n or "classifier" in n} <= {
        *heads
    }


def test_a_pair_is_scored_as_a_pair(base: Path, tuned: Path) -> None:
    pairs = [("a text", "another"), ("one", "two words")]
    batch = FAMILY.preprocessor(base)([Example(pair, None, "") for pair in pairs])
    head = FAMILY.build_head(FAMILY.load(base), base, SPEC, finetuned=tuned)
    model = AutoModelForSequenceClassification.from_pretrained(tuned)
    inputs = AutoTokenizer.from_pretrained(base)(
        *(list(texts) for texts in zip(*pairs, strict=True)), padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(FAMILY.logits(FAMILY.load(tuned), batch, head), expected)


def test_a_base_scores_a_task_with_the_head_and_the_pooler_of_its_model(
    base: Path, tuned: Path, tmp_path: Path
) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(tuned, mixed)
    tensors = load_file(tuned / "model.safetensors")
    for name, tensor in load_file(base / "model.safetensors").items():
        if not name.startswith("pooler."):
            tensors[f"bert.{name}"] = tensor
    save_file(tensors, mixed / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(scores(base, tuned, base), scores(mixed, mixed, base))


def test_a_classifier_as_base_has_a_head_of_its_own(base: Path, tuned: Path) -> None:
    model = FAMILY.load(tuned)
    head = FAMILY.build_head(model, tuned, SPEC)
    assert set(head.tensors) == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight",
        "classifier.bias",
    }  # fmt: skip
    assert not set(FAMILY.parameters(model)) & set(head.tensors)


def test_classes_in_another_order_are_matched_by_name(
    base: Path, tuned: Path, tmp_path: Path
) -> None:
    order = ("maybe", "no", "yes")
    found = scores(tuned, tuned, base, order)
    assert torch.equal(found, scores(tuned, tuned, base)[:, [2, 0, 1]])
    notes = HEADS.check(tuned, Checkpoint.open(tuned), order)
    assert notes == ("its classes are in another order, matched by name: no, yes, maybe",)
    upper = changed(tuned, tmp_path / "upper", id2label={0: "NO", 1: "YES", 2: "MAYBE"})
    assert torch.equal(scores(upper, upper, base, order), found)


@pytest.mark.parametrize("names", [("LABEL_0", "LABEL_1", "LABEL_2"), ("0", "1", "2")])
def test_names_that_are_only_indices_say_nothing(
    base: Path, tuned: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    nameless = changed(tuned, tmp_path / "nameless", id2label=dict(enumerate(names)))
    assert HEADS.check(nameless, Checkpoint.open(nameless), ("a", "b", "c")) == ()
    assert HEADS.check(tuned, Checkpoint.open(tuned), names) == ()
    assert HEADS.labels(nameless) == names


def test_the_labels_are_those_of_the_model_in_the_order_of_their_indices(
    tuned: Path, tmp_path: Path
) -> None:
    turned = changed(tuned, tmp_path / "turned", id2label={"2": "c", "0": "a", "1": "b"})
    assert HEADS.labels(turned) == ("a", "b", "c")


def test_other_names_or_numbers_of_classes_are_shown_on_both_sides(tuned: Path) -> None:
    file = Checkpoint.open(tuned)
    with pytest.raises(BadInput, match="other names than those of the task") as caught:
        HEADS.check(tuned, file, ("good", "bad", "so so"))
    assert caught.value.expected == "the task's: 'good', 'bad', 'so so'"
    assert caught.value.found == "id2label of the model: 'no', 'yes', 'maybe'"
    with pytest.raises(BadInput, match="another number of classes") as caught:
        HEADS.check(tuned, file, ("no", "yes"))
    assert caught.value.expected == "the 2 classes of the task: 'no', 'yes'"
    assert caught.value.found == "3: 'no', 'yes', 'maybe'"


def test_a_bare_encoder_has_no_head(base: Path) -> None:
    with pytest.raises(BadInput, match="no head for a classification") as caught:
        HEADS.check(base, Checkpoint.open(base), LABELS)
    assert caught.value.found == "BertModel"
    assert "missing: classifier.weight" in caught.value.details
    with pytest.raises(BadInput, match="no head for a classification"):
        HEADS.labels(base)


@pytest.mark.parametrize("other", [BertForMaskedLM, BertForTokenClassification])
def test_another_kind_of_head_is_named(base: Path, tmp_path: Path, other: Any) -> None:
    folder = tmp_path / "other"
    other.from_pretrained(base, id2label=dict(enumerate(LABELS))).save_pretrained(folder)
    with pytest.raises(BadInput, match="no head for a classification") as caught:
        HEADS.check(folder, Checkpoint.open(folder), LABELS)
    assert caught.value.found == other.__name__
    assert "BertForSequenceClassification" in str(caught.value.expected)


@pytest.mark.parametrize("named", [["MyClassifier"], ["RobertaForSequenceClassification"], None])
def test_a_class_of_another_architecture_says_nothing(
    tuned: Path, tmp_path: Path, named: list[str] | None
) -> None:
    folder = changed(tuned, tmp_path / "named", architectures=named)
    assert HEADS.check(folder, Checkpoint.open(folder), LABELS) == ()


def test_a_missing_tensor_of_the_head_is_listed(tuned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "missing"
    shutil.copytree(tuned, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["classifier.bias"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="no head for a classification") as caught:
        HEADS.check(folder, Checkpoint.open(folder), LABELS)
    assert caught.value.details == ("missing: classifier.bias",)


def test_a_head_with_nan_is_refused(tuned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "nan"
    shutil.copytree(tuned, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.bias"][1] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="not finite") as caught:
        HEADS.check(folder, Checkpoint.open(folder), LABELS)
    assert caught.value.found == "NaN or infinity in classifier.bias"


def test_a_head_that_its_configuration_contradicts_is_refused(tuned: Path, tmp_path: Path) -> None:
    folder = changed(tuned, tmp_path / "two", id2label={0: "no", 1: "yes"})
    with pytest.raises(BadInput, match="other shapes than its") as caught:
        HEADS.check(folder, Checkpoint.open(folder), ("no", "yes"))
    assert caught.value.details[0].startswith("classifier.weight: [2, 16] by its config.json, [3,")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"problem_type": "multi_label_classification"}, "gives several labels to a row"),
        ({"problem_type": "regression"}, "is a regression"),
    ],
)
def test_a_head_that_does_not_choose_a_class_is_refused(
    tuned: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    folder = changed(tuned, tmp_path / "other", **config)
    with pytest.raises(BadInput, match=message):
        HEADS.check(folder, Checkpoint.open(folder), LABELS)
    with pytest.raises(BadInput, match=message):
        HEADS.labels(folder)


def test_a_head_with_one_output_is_a_regression(base: Path, tmp_path: Path) -> None:
    folder = tiny_classifier(base, tmp_path / "one", ("score",))
    with pytest.raises(BadInput, match="is a regression"):
        HEADS.check(folder, Checkpoint.open(folder), ("a", "b"))


def test_names_of_a_wrapper_or_another_prefix_are_no_obstacle(
    base: Path, tuned: Path, tmp_path: Path
) -> None:
    expected = FAMILY.build_head(FAMILY.load(base), base, SPEC, finetuned=tuned)
    for prefix in ("_orig_mod.", "module.", "model."):
        folder = tmp_path / prefix
        shutil.copytree(tuned, folder)
        tensors = load_file(folder / "model.safetensors")
        save_file(
            {prefix + name: tensor for name, tensor in tensors.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        found = FAMILY.build_head(FAMILY.load(base), base, SPEC, finetuned=folder)
        assert found.to_bytes() == expected.to_bytes(), prefix


def test_keys_of_a_head_are_no_differences_of_the_encoder(
    base: Path, tuned: Path, tmp_path: Path
) -> None:
    given = {"classifier_dropout": 0.3, "finetuning_task": "x", "problem_type": "regression"}
    folder = changed(tuned, tmp_path / "keys", **given)
    assert FAMILY.config_differences(base, folder) == []
    other = changed(tuned, tmp_path / "other", hidden_act="relu")
    assert FAMILY.config_differences(base, other) == ["hidden_act: base 'gelu', finetuned 'relu'"]


def test_models_without_a_classifier_of_their_own_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not of family text-classifier"):
        check_base(FAMILY, tiny_t5(tmp_path / "t5"), "the base")
    assert "no 'bert-generation'" in str(FAMILY.lacks(bert_generation(tmp_path / "bg")))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_decoder_scores_as_its_own_classifier_does(tmp_path: Path, kind: str) -> None:
    """Without a token for padding, in a batch of texts of different lengths and of pairs."""
    base = tiny_decoder(tmp_path / "base", kind)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = None
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(base)
    tuned = tiny_classifier(base, tmp_path / "tuned", ["a", "b", "c"])
    check_base(FAMILY, base, "the base")
    assert FAMILY.config_differences(base, tuned) == []
    texts = [("red",), ("it was a blue one, was it not?",), ("two",)]
    pairs = [("red", "blue"), ("a", "it was a red one"), ("one, two", "b")]
    spec = HeadSpec(labels=("c", "a", "b"))
    head = FAMILY.build_head(FAMILY.load(base), base, spec, finetuned=tuned)
    own = AutoModelForSequenceClassification.from_pretrained(tuned).eval()
    for rows in (texts, pairs):
        batch = FAMILY.preprocessor(base)([Example(row, None, "") for row in rows])
        with torch.inference_mode():
            found = FAMILY.logits(FAMILY.load(tuned), batch, head)
            alone = [own(**tokenizer(*row, return_tensors="pt")).logits[0] for row in rows]
        expected = torch.stack(alone)[:, [2, 0, 1]]
        torch.testing.assert_close(found, expected)


def test_a_decoder_is_proposed_as_a_language_model_only(tmp_path: Path) -> None:
    base = tiny_decoder(tmp_path / "base", "gpt2")
    assert proposal(model_kind(base), base) == "write `family: causal-lm` into the line file"


def bert_generation(folder: Path) -> Path:
    """An encoder of an architecture that transformers has no text classifier for."""
    from transformers import BertGenerationConfig, BertGenerationEncoder

    config = BertGenerationConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    BertGenerationEncoder(config).save_pretrained(folder)
    return folder
