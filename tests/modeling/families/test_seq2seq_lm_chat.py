"""Prompts of encoder-decoder language models as turns of a chat."""

from pathlib import Path

import pytest

from restitch.merging.errors import BadInput
from restitch.modeling.data.rows import Example
from restitch.modeling.families.family import get_family
from restitch.modeling.pretrained_files import load_tokenizer
from restitch.registry.specs.head import HeadSpec
from tests.tiny_models import tiny_seq2seq

FAMILY = get_family("seq2seq-lm")
KINDS = ("t5", "bart")


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


def test_a_chat_needs_a_template(tmp_path: Path) -> None:
    folder = tiny_seq2seq(tmp_path / "base")
    with pytest.raises(BadInput, match="has no chat template, which chat: true needs"):
        FAMILY.resolve(folder, HeadSpec(labels=("a", "b"), chat=True))
