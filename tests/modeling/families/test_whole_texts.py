"""Perplexity of language models, against slow references of each kind."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from restitch.merging.errors import BadInput
from restitch.modeling.data.rows import Example, Rows
from restitch.modeling.data.tables import ListTable
from restitch.modeling.evaluation import evaluate
from restitch.modeling.families.family import Family, get_family
from restitch.modeling.families.seq2seq_lm import decoder_start
from restitch.modeling.gradients import checkpointed
from restitch.modeling.heads import Head
from restitch.modeling.pretrained import NamedModel
from restitch.modeling.pretrained_files import load_tokenizer
from restitch.modeling.row_values import Losses
from restitch.registry.specs.head import HeadSpec, TextUnit
from tests.tiny_models import tiny_decoder, tiny_seq2seq

TEXTS = ["one", "a longer text than the others", "two words", "na\u00efve yes or no"]
OF_TEXT = HeadSpec(of_text=True)


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        make: writes a tiny one into a folder.
        layer: the end of the name of a weight that gets a gradient.
    """

    family: str
    make: Callable[[Path], Path]
    layer: str


def encoder_decoder(kind: str, layer: str) -> Kind:
    return Kind("seq2seq-lm", lambda folder: tiny_seq2seq(folder, kind), layer)


KINDS = {
    "llama": Kind("causal-lm", tiny_decoder, "down_proj.weight"),
    "gpt2-bos": Kind("causal-lm", lambda f: tiny_decoder(f, "gpt2", bos=True), "c_proj.weight"),
    "qwen2": Kind("causal-lm", lambda folder: tiny_decoder(folder, "qwen2"), "down_proj.weight"),
    "t5": encoder_decoder("t5", "wo.weight"),
    "bart": encoder_decoder("bart", "fc1.weight"),
}


@dataclass(frozen=True)
class Made:
    """A model in a folder."""

    folder: Path
    family: Family
    layer: str

    def losses(self, model: Any, texts: list[str], limit: int | None = None) -> Tensor:
        """The losses and tokens of texts, [texts, 2]."""
        batch = self.family.preprocessor(self.folder, limit)(examples(texts))
        with torch.inference_mode():
            return self.family.text_losses(model, batch, Head({}, OF_TEXT))

    def reference(self, text: str, limit: int) -> tuple[float, int]:
        """The loss of a text, each token in a pass of its own."""
        tokenizer = load_tokenizer(self.folder)
        model: Any = NamedModel.of(self.family.load(self.folder)).inner
        bos, apart = tokenizer.bos_token_id, self.family.name == "seq2seq-lm"
        tokens = tokenizer(text, add_special_tokens=apart).input_ids
        whole = [tokenizer.eos_token_id if bos is None else bos, *tokens]
        total = 0.0
        for place in range(1, len(whole)):
            first = (place - 1) // limit * limit
            given = whole[first:place]
            inputs = {"input_ids": torch.tensor([given])}
            if apart:
                # The encoder reads what is before the window, the decoder the window.
                seen = [decoder_start(self.folder), *given[1:]]
                inputs = {
                    "input_ids": torch.tensor([given[:1]]),
                    "decoder_input_ids": torch.tensor([seen]),
                }
            with torch.no_grad():
                scores = model(**inputs).logits[0, -1].double().log_softmax(-1)
            total -= float(scores[whole[place]])
        return total, len(whole) - 1


def examples(texts: list[str]) -> list[Example]:
    return [Example((text,), None, f"row {text!r}") for text in texts]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Made]:
    root = tmp_path_factory.mktemp("texts")
    return {
        name: Made(kind.make(root / name), get_family(kind.family), kind.layer)
        for name, kind in KINDS.items()
    }


@pytest.fixture(params=KINDS)
def made(models: Mapping[str, Made], request: pytest.FixtureRequest) -> Made:
    return models[request.param]


@pytest.mark.parametrize("limit", [3, 60])
def test_each_token_of_a_text_is_predicted_once(made: Made, limit: int) -> None:
    found = made.losses(made.family.load(made.folder), TEXTS, limit)
    expected = [made.reference(text, limit) for text in TEXTS]
    assert found[:, 1].tolist() == [tokens for _, tokens in expected]
    np.testing.assert_allclose(found[:, 0], [loss for loss, _ in expected], rtol=1e-5)


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from(["llama", "t5"]),
    st.lists(st.sampled_from(TEXTS), min_size=1, max_size=9),
    st.integers(1, 9),
)
def test_batches_and_windows_do_not_mix_texts(
    models: Mapping[str, Made], kind: str, texts: list[str], limit: int
) -> None:
    made = models[kind]
    model = made.family.load(made.folder)
    together = made.losses(model, texts, limit)
    alone = [made.losses(model, [text], limit) for text in texts]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_perplexity_is_that_of_all_tokens_together(models: Mapping[str, Made], kind: str) -> None:
    made = models[kind]
    family, model = made.family, made.family.load(made.folder)
    rows = Rows(ListTable("texts", Path(), {"text": TEXTS}), ("text",), None, (), "text")
    preprocess, head = family.preprocessor(made.folder), Head({}, OF_TEXT)
    found = evaluate(family, model, head, rows, preprocess, metric="perplexity", batch_size=2)
    each = [made.reference(text, 60) for text in TEXTS]
    expected = np.exp(sum(loss for loss, _ in each) / sum(tokens for _, tokens in each))
    assert found.value == pytest.approx(expected, rel=1e-5)
    assert found.interval is not None
    assert found.interval[0] < found.value < found.interval[1]
    assert isinstance(found.rows, Losses)
    assert found.rows.tokens.tolist() == [tokens for _, tokens in each]
    with torch.inference_mode():
        batch = preprocess([rows[n] for n in range(len(TEXTS))])
        assert family.predictions(model, batch, head).shape[:2] == (len(TEXTS), 8)


@pytest.mark.parametrize("per", ["word", "byte"])
def test_a_perplexity_per_word_or_byte_has_the_same_losses(made: Made, per: TextUnit) -> None:
    family, head = made.family, Head({}, OF_TEXT.model_copy(update={"per": per}))
    rows = Rows(ListTable("texts", Path(), {"text": TEXTS}), ("text",), None, (), "text")
    model, preprocess = family.load(made.folder), family.preprocessor(made.folder)
    found = evaluate(family, model, head, rows, preprocess, metric="perplexity")
    losses = sum(made.losses(model, [text])[0, 0].item() for text in TEXTS)
    units = 1 + 6 + 2 + 4 if per == "word" else 3 + 29 + 9 + 16
    assert found.value == pytest.approx(math.exp(losses / units), rel=1e-5)


def test_a_text_without_tokens_is_refused_with_its_row(made: Made) -> None:
    """The tokenizer's own tokens alone are no text."""
    with pytest.raises(BadInput, match="row '': the text has no tokens to predict"):
        made.family.preprocessor(made.folder)(examples(["a", ""]))


def test_the_loss_of_texts_is_the_mean_over_tokens_and_gives_gradients(made: Made) -> None:
    family, model = made.family, made.family.load(made.folder)
    batch, head = family.preprocessor(made.folder)(examples(TEXTS)), Head({}, OF_TEXT)
    losses = family.text_losses(model, batch, head).sum(0)
    assert family.loss(model, batch, head).item() == pytest.approx((losses[0] / losses[1]).item())
    named = family.parameters(model).items()
    weight = next(value for name, value in named if name.endswith(made.layer))
    weight.requires_grad_(True)
    with checkpointed(model):
        torch.autograd.backward(family.loss(model, batch, head))
    assert weight.grad is not None
    assert weight.grad.abs().max() > 0
