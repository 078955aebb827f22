"""Perplexity and chats of encoder-decoder language models, against slow references."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from restitch.merging.errors import BadInput
from restitch.modeling.data.rows import Example, Rows
from restitch.modeling.data.tables import ListTable
from restitch.modeling.evaluation import evaluate
from restitch.modeling.families import seq2seq_lm
from restitch.modeling.families.family import get_family
from restitch.modeling.gradients import checkpointed
from restitch.modeling.heads import Head
from restitch.modeling.pretrained import NamedModel, load_tokenizer
from restitch.modeling.row_values import Losses
from restitch.registry.specs.task import HeadSpec
from tests.tiny_models import tiny_seq2seq

FAMILY = get_family("seq2seq-lm")
KINDS = ("t5", "bart")
TEXTS = ["one", "a longer text than the others", "two words", "na\u00efve yes or no"]
OF_TEXT = HeadSpec(of_text=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("seq2seq")
    return {kind: tiny_seq2seq(root / kind, kind) for kind in KINDS}


def text_examples(texts: list[str]) -> list[Example]:
    return [Example((text,), None, f"row {text!r}") for text in texts]


def reference_losses(folder: Path, text: str, limit: int) -> tuple[float, int]:
    """The loss of a text, each token in a pass of the decoder of its own."""
    tokenizer, model = load_tokenizer(folder), NamedModel.of(FAMILY.load(folder)).inner
    bos = tokenizer.bos_token_id
    whole = [tokenizer.eos_token_id if bos is None else bos, *tokenizer(text).input_ids]
    total = 0.0
    for place in range(1, len(whole)):
        first = (place - 1) // limit * limit
        seen = [seq2seq_lm.decoder_start(folder), *whole[first + 1 : place]]
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor([[whole[first]]]), decoder_input_ids=torch.tensor([seen])
            ).logits
        total -= float(logits[0, -1].double().log_softmax(-1)[whole[place]])
    return total, len(whole) - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [3, 60])
def test_each_token_of_a_text_is_predicted_once(folders, kind, limit):
    folder = folders[kind]
    model = FAMILY.load(folder)
    batch = FAMILY.preprocessor(folder, limit)(text_examples(TEXTS))
    with torch.inference_mode():
        found = FAMILY.text_losses(model, batch, Head({}, OF_TEXT))
    expected = [reference_losses(folder, text, limit) for text in TEXTS]
    assert found[:, 1].tolist() == [tokens for _, tokens in expected]
    np.testing.assert_allclose(found[:, 0], [loss for loss, _ in expected], rtol=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=9), st.integers(1, 9))
def test_batches_and_windows_do_not_mix_texts(folders, texts, limit):
    folder = folders["t5"]
    model, preprocess = FAMILY.load(folder), FAMILY.preprocessor(folder, limit)
    head = Head({}, OF_TEXT)
    with torch.inference_mode():
        together = FAMILY.text_losses(model, preprocess(text_examples(texts)), head)
        alone = [FAMILY.text_losses(model, preprocess(text_examples([t])), head) for t in texts]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_perplexity_is_that_of_all_tokens_together(folders):
    folder = folders["t5"]
    rows = Rows(ListTable("texts", Path(), {"text": TEXTS}), ("text",), None, (), "text")
    model, preprocess = FAMILY.load(folder), FAMILY.preprocessor(folder)
    head = Head({}, OF_TEXT)
    found = evaluate(FAMILY, model, head, rows, preprocess, metric="perplexity", batch_size=2)
    each = [reference_losses(folder, text, 60) for text in TEXTS]
    expected = np.exp(sum(loss for loss, _ in each) / sum(tokens for _, tokens in each))
    assert found.value == pytest.approx(expected, rel=1e-5)
    assert isinstance(found.rows, Losses)
    with torch.inference_mode():
        batch = preprocess([rows[n] for n in range(len(TEXTS))])
        assert FAMILY.predictions(model, batch, head).shape[:2] == (len(TEXTS), 8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_without_tokens_is_refused_with_its_row(folders, kind):
    """The tokenizer's own tokens alone are no text."""
    with pytest.raises(BadInput, match="row '': the text has no tokens to predict"):
        FAMILY.preprocessor(folders[kind])(text_examples(["a", ""]))


def test_the_loss_of_texts_is_the_mean_over_tokens_and_gives_gradients(folders):
    folder = folders["bart"]
    model = FAMILY.load(folder)
    batch, head = FAMILY.preprocessor(folder)(text_examples(TEXTS)), Head({}, OF_TEXT)
    losses = FAMILY.text_losses(model, batch, head).sum(0)
    assert FAMILY.loss(model, batch, head).item() == pytest.approx((losses[0] / losses[1]).item())
    weight = next(t for name, t in FAMILY.parameters(model).items() if name.endswith("fc1.weight"))
    weight.requires_grad_(True)
    with checkpointed(model):
        torch.autograd.backward(FAMILY.loss(model, batch, head))
    assert weight.grad is not None
    assert weight.grad.abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_is_read_as_its_template_writes_it(tmp_path: Path, kind: str) -> None:
    """The template says itself what stands around a turn: the tokenizer adds nothing to it."""
    folder = tiny_seq2seq(tmp_path / "base", kind)
    turns = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[answer]"
    (folder / "chat_template.jinja").write_text(turns)
    tokenizer = load_tokenizer(folder)
    chat = Example(("is it",), None, "row 0", ("blue", "red"), chat=True)
    batch = FAMILY.preprocessor(folder)([chat])
    expected = tokenizer("[user]is it[answer]", add_special_tokens=False).input_ids
    assert batch["prompt"][0].tolist() == expected
    answers = [tokenizer(text, add_special_tokens=False).input_ids for text in ("blue", "red")]
    found = [
        tokens[:length].tolist()
        for tokens, length in zip(batch["answers"][0], batch["answer_length"][0], strict=True)
    ]
    assert found == answers
    assert FAMILY.resolve(folder, HeadSpec(labels=("a", "b"), chat=True)).chat


def test_a_chat_needs_a_template(folders) -> None:
    with pytest.raises(BadInput, match="has no chat template, which chat: true needs"):
        FAMILY.resolve(folders["t5"], HeadSpec(labels=("a", "b"), chat=True))
