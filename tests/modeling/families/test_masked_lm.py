"""Masked language models: the contract, and words at the mask against a slow reference."""

import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModel, BertForSequenceClassification

from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.coordinates import select_tensors
from restitch.modeling.data.rows import Example, Prompt, Rows
from restitch.modeling.data.tables import ListTable
from restitch.modeling.evaluation import evaluate
from restitch.modeling.families.family import get_family
from restitch.modeling.gradients import checkpointed
from restitch.modeling.pretrained import NamedModel
from restitch.modeling.pretrained_files import load_tokenizer
from restitch.modeling.text_inputs import position_limit
from restitch.registry.specs.head import HeadSpec
from tests.modeling.family_contract import FamilyContract
from tests.tiny_models import (
    WORDS,
    tiny_bert,
    tiny_decoder,
    tiny_masked,
    tiny_seq2seq,
    tiny_t5,
    tweaked,
)

FAMILY = get_family("masked-lm")
KINDS = ("roberta", "bert", "deberta-v2", "modernbert")
TEXTS = ["one", "a longer text than the others", "two words", "?", "now", "yes or no"]


class MaskedContract(FamilyContract):
    kind = "roberta"
    prompt = Prompt("{x} it was {mask}.", mask=True)

    @pytest.fixture
    def family(self):
        return FAMILY

    @pytest.fixture
    def base(self, tmp_path):
        return tiny_masked(tmp_path / "base", self.kind)

    @pytest.fixture
    def finetuned(self, tmp_path, base):
        return tweaked(base, tmp_path / "tuned", seed=1)

    @pytest.fixture
    def values(self):
        return TEXTS


class TestRoberta(MaskedContract):
    pass


class TestBert(MaskedContract):
    kind = "bert"


class TestDebertaV2(MaskedContract):
    kind = "deberta-v2"


class TestModernBert(MaskedContract):
    kind = "modernbert"


@cache
def loaded(folder: Path) -> nn.Module:
    return FAMILY.load(folder)


# The reference: the prompt with the tokenizer's own mask, alone, and the logits of all positions.


def reference(folder: Path, row: Example, word: str) -> float:
    """The log-probability of a word at the mask of a prompt that fits."""
    before, after = row.inputs
    tokenizer, model = load_tokenizer(folder), NamedModel.of(loaded(folder)).inner
    tokens = tokenizer(f"{before}{word}{after}").input_ids
    other = tokenizer(f"{before}{'no' if word != 'no' else 'yes'}{after}").input_ids
    (place,) = (at for at, pair in enumerate(zip(tokens, other, strict=True)) if len({*pair}) == 2)
    token, tokens[place] = tokens[place], tokenizer.mask_token_id
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens])).logits
    return float(logits[0, place].double().log_softmax(-1)[token])


def example(before: str, after: str, *words: str | None, label: int | None = None) -> Example:
    return Example((before, after), label, f"row {before!r}", words)


def scores_of(
    folder: Path, examples: list[Example], mode: str | None = None, *, grad: bool = False
) -> torch.Tensor:
    head = FAMILY.build_head(loaded(folder), folder, HeadSpec(labels=("a", "b"), score=mode))
    batch = FAMILY.preprocessor(folder)(examples)
    with torch.set_grad_enabled(grad):
        return FAMILY.logits(loaded(folder), batch, head)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("masked")
    return {kind: tiny_masked(root / kind, kind) for kind in KINDS}


PARTS = st.text(alphabet="are bly", max_size=15)
CHOICES = st.lists(st.sampled_from(WORDS), min_size=2, max_size=4, unique=True)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.lists(st.tuples(PARTS, PARTS, CHOICES), min_size=1, max_size=4),
    st.sampled_from([None, "sum", "per_token", "per_character"]),
    st.booleans(),
)
def test_scores_are_those_of_each_word_at_the_mask_of_its_prompt_alone(
    folders: dict[str, Path],
    kind: str,
    questions: list[tuple[str, str, list[str]]],
    mode: str | None,
    grad: bool,
) -> None:
    most = max(len(words) for *_, words in questions)
    rows = [
        example(f"x{before} ", f" {after}", *words, *[None] * (most - len(words)))
        for before, after, words in questions
    ]
    found = scores_of(folders[kind], rows, mode, grad=grad)
    expected = np.full(found.shape, -np.inf)
    for row, (_, _, words) in enumerate(questions):
        for column, word in enumerate(words):
            size = len(word) if mode == "per_character" else 1
            expected[row, column] = reference(folders[kind], rows[row], word) / size
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["roberta", "bert", "modernbert"])
def test_the_tokens_are_those_of_the_tokenizer_s_own_mask(folders, kind) -> None:
    tokenizer = load_tokenizer(folders[kind])
    batch = FAMILY.preprocessor(folders[kind])([example("are they ", ". yes", "red", "blue")])
    whole = tokenizer("are they <mask>. yes").input_ids
    assert batch["prompt"][0].tolist() == whole
    assert int(batch["mask"][0]) == whole.index(tokenizer.mask_token_id)


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_sees_only_the_mask(folders, monkeypatch, kind) -> None:
    inner, seen = NamedModel.of(loaded(folders[kind])).inner, []
    handle = inner.get_output_embeddings().register_forward_hook(
        lambda _module, _given, output: seen.append(output.shape[1])
    )
    rows = [example("are they ", ".", "red", "blue"), example("x ", " or not", "one", "two")]
    scores_of(folders[kind], rows)
    handle.remove()
    assert seen == [1]


def test_a_model_without_an_encoder_of_its_own_scores_the_same(folders, monkeypatch) -> None:
    rows = [example("are they ", ".", "red", "blue"), example("x ", " or not", "one", "two")]
    whole = scores_of(folders["bert"], rows)
    inner = NamedModel.of(loaded(folders["bert"])).inner
    monkeypatch.setattr(type(inner), "base_model", property(lambda self: self))
    torch.testing.assert_close(scores_of(folders["bert"], rows), whole, atol=1e-5, rtol=0)


def test_a_long_prompt_loses_its_beginning_and_keeps_the_mask(folders) -> None:
    folder = folders["bert"]
    tokenizer = load_tokenizer(folder)
    batch = FAMILY.preprocessor(folder, 12)(
        [
            example("a b c d e f g h i j k l ", " . ?", "red", "blue"),
            example("a b ", " c d e f g h i j k l m", "red", "blue"),
            example("", " c d e f g h i j k l m", "red", "blue"),
            example("a ", " .", "red", "blue"),
        ]
    )
    shown = [
        tokenizer.decode(tokens[:length].tolist())
        for tokens, length in zip(batch["prompt"], batch["prompt_length"], strict=True)
    ]
    assert shown == [
        "<s> f g h i j k l <mask> . ? </s>",
        "<s> <mask> c d e f g h i j k </s>",
        "<s> <mask> c d e f g h i j k </s>",
        "<s> a <mask> . </s>",
    ]
    assert batch["cut"].tolist() == [5, 4, 2, 0]
    places = batch["prompt"][torch.arange(4), batch["mask"]]
    assert set(places.tolist()) == {tokenizer.mask_token_id}


BAD = {
    "several tokens": ("x ", ".", "reda", "the choice 'reda' is not one token"),
    "its tokens": ("x ", ".", "reda", "2 tokens: 'Ġred', 'a'"),
    "two words": ("x ", ".", "red blue", "the choice 'red blue' is not one token"),
    "no space before": ("x", ".", "red", "the choice 'blue' is not one token"),
}


@pytest.mark.parametrize(("before", "after", "word", "message"), BAD.values(), ids=BAD)
def test_a_word_that_is_not_one_token_is_refused_with_its_tokens(
    folders, before, after, word, message
) -> None:
    with pytest.raises(BadInput) as caught:
        FAMILY.preprocessor(folders["roberta"])([example(before, after, "blue", word)])
    assert message in str(caught.value)
    assert "row 'x" in str(caught.value)


def test_a_word_that_joins_the_text_around_it_is_refused(folders) -> None:
    with pytest.raises(BadInput, match="shares a token with the text around it"):
        FAMILY.preprocessor(folders["bert"])([example("may", "", "be", "no")])


def test_a_word_outside_of_the_vocabulary_is_refused(folders) -> None:
    with pytest.raises(BadInput, match="the choice 'naïve' is not in the vocabulary"):
        FAMILY.preprocessor(folders["bert"])([example("x ", ".", "red", "naïve")])


def test_two_words_with_the_same_token_are_refused(folders) -> None:
    with pytest.raises(BadInput, match="'Red' has the tokens of another choice"):
        FAMILY.preprocessor(folders["bert"])([example("x ", ".", "red", "Red")])


def test_the_loss_is_the_negative_log_likelihood_of_the_right_word(folders) -> None:
    rows = [
        example("are they ", ".", "red", "blue", "one", label=1),
        example("x ", "", "two", "was", None, label=0),
    ]
    for folder in folders.values():
        head = FAMILY.build_head(loaded(folder), folder, HeadSpec(labels=("a", "b")))
        batch = FAMILY.preprocessor(folder)(rows)
        expected = [reference(folder, row, str(row.choices[row.label or 0])) for row in rows]
        assert float(FAMILY.loss(loaded(folder), batch, head)) == pytest.approx(
            -np.mean(expected), abs=1e-4
        )


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_when_activations_are_computed_again(folders, kind) -> None:
    folder = folders[kind]
    model = FAMILY.load(folder)
    head = FAMILY.build_head(model, folder, HeadSpec(labels=("a", "b")))
    batch = FAMILY.preprocessor(folder)([example("are they ", ".", "red", "blue", label=1)])
    live = [p.requires_grad_() for p in FAMILY.parameters(model).values()]

    def gradients() -> list[torch.Tensor]:
        loss = FAMILY.loss(model, batch, head)
        return list(torch.autograd.grad(loss, live, materialize_grads=True))

    plain = gradients()
    with checkpointed(model):
        again = gradients()
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_pairs_are_evaluated_by_their_prompt(folders) -> None:
    folder = folders["roberta"]
    values = {"a": ["is it", "or not"], "b": ["it is", "are"], "y": ["blue", "red"]}
    prompt = Prompt("{a} ? {mask} , {b}", mask=True)
    rows = Rows(
        ListTable("rows", Path(), values), ("a", "b"), "y", ("red", "blue"), "text", prompt=prompt
    )
    head = FAMILY.build_head(loaded(folder), folder, HeadSpec(labels=("red", "blue")))
    found = evaluate(FAMILY, loaded(folder), head, rows, FAMILY.preprocessor(folder))
    best = []
    for a, b in zip(values["a"], values["b"], strict=True):
        scores = [
            reference(folder, example(f"{a} ? ", f" , {b}"), word) for word in ("red", "blue")
        ]
        best.append(("red", "blue")[int(np.argmax(scores))])
    assert found.value == np.mean([x == y for x, y in zip(best, values["y"], strict=True)])


def encoder_alone(folder: Path) -> Path:
    AutoModel.from_pretrained(tiny_masked(folder, "bert")).save_pretrained(folder)
    return folder


def classifier(folder: Path) -> Path:
    BertForSequenceClassification.from_pretrained(tiny_masked(folder, "bert")).save_pretrained(
        folder
    )
    return folder


def without_mask(folder: Path) -> Path:
    tiny_masked(folder, "bert")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["mask_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("make", "lacking"),
    [
        (encoder_alone, "the tensors of a masked-language-model head (cls.predictions."),
        (classifier, "the tensors of a masked-language-model head (cls.predictions."),
        (tiny_bert, "the tensors of a masked-language-model head (cls.predictions."),
        (lambda f: tiny_t5(f, encoder=True), "a head that AutoModelForMaskedLM"),
        (without_mask, "a tokenizer with a mask token"),
    ],
)
def test_a_base_without_what_the_family_needs_is_refused(tmp_path, make, lacking) -> None:
    assert str(FAMILY.lacks(make(tmp_path / "base"))).startswith(lacking)


def test_a_configuration_alone_lacks_nothing(folders, tmp_path) -> None:
    shutil.copy(folders["bert"] / "config.json", tmp_path)
    assert FAMILY.lacks(tmp_path) is None


@pytest.mark.parametrize("make", [tiny_decoder, tiny_seq2seq])
def test_models_of_other_kinds_are_refused(tmp_path, make) -> None:
    with pytest.raises(BadInput, match="not a model of the family masked-lm"):
        FAMILY.load(make(tmp_path / "other"))


def test_embeddings_and_heads_are_never_localizable(folders) -> None:
    for kind, folder in folders.items():
        file = Checkpoint.open(folder)
        chosen = select_tensors(file.floating, FAMILY.localizable)
        assert chosen, kind
        assert all(".0." in name or ".1." in name for name in chosen)
        assert not any("embed" in name or name.startswith(("cls", "lm_head")) for name in chosen)


def test_the_length_counts_special_tokens(folders) -> None:
    assert FAMILY.max_length(folders["roberta"]) == 64
    assert position_limit(folders["roberta"]) == 78
