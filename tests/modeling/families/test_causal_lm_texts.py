"""Generated answers of causal language models, against slow references."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from restitch.merging.errors import BadInput
from restitch.modeling.data.rows import Prompt, Rows
from restitch.modeling.data.tables import ListTable
from restitch.modeling.evaluation import evaluate
from restitch.modeling.families.family import get_family
from restitch.modeling.generation import until_stop
from restitch.modeling.heads import Head
from restitch.modeling.pretrained import NamedModel
from restitch.modeling.pretrained_files import load_tokenizer
from restitch.modeling.row_values import Bits
from restitch.registry.specs.head import GenerateSpec, HeadSpec
from tests.tiny_models import RECURRENT, decoder_of, tiny_decoder

FAMILY = get_family("causal-lm")
TEXTS = ["one", "a longer text than the others", "two words", "naïve yes or no"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("decoders")
    made = {
        name: tiny_decoder(root / name, name.split("-")[0], bos="-bos" in name)
        for name in ("llama", "gpt2-bos", "qwen2")
    }
    windows = decoder_of(root / "windows", "mistral", sliding_window=12)
    # Padding before a prompt changes the state of this one.
    recurrent = decoder_of(root / "recurrent", "recurrent_gemma", **RECURRENT)
    return {**made, "windows": windows, "recurrent": recurrent}


def answers(folder: Path, texts: list[str], written: Sequence[object]) -> tuple[Rows, Head]:
    """Rows with answers, and a head that generates up to four tokens."""
    table = ListTable("rows", Path(), {"q": texts, "answer": written})
    rows = Rows(table, ("q",), "answer", (), "text", prompt=Prompt("{q}", answer="answer"))
    spec = HeadSpec(prompt="{q}", answer="answer", generate=GenerateSpec(max_new_tokens=4))
    return rows, FAMILY.build_head(torch.nn.Identity(), folder, spec)


def greedy(folder: Path, prompt: str, tokens: int) -> str:
    """The likeliest tokens one by one, without a cache and without padding."""
    tokenizer, model = load_tokenizer(folder), NamedModel.of(FAMILY.load(folder)).inner
    seen = tokenizer(prompt.rstrip()).input_ids
    start = len(seen)
    for _ in range(tokens):
        with torch.no_grad():
            best = int(model(input_ids=torch.tensor([seen])).logits[0, -1].argmax())
        if best == tokenizer.eos_token_id:
            break
        seen.append(best)
    found: str = tokenizer.decode(seen[start:], skip_special_tokens=True)
    return found


@pytest.mark.parametrize("beginning", ["", "all begin with this: "])
@pytest.mark.parametrize("name", ["llama", "gpt2-bos", "qwen2", "windows", "recurrent"])
def test_texts_are_generated_greedily_whatever_else_is_in_the_batch(folders, name, beginning):
    folder, texts = folders[name], [beginning + text for text in TEXTS]
    expected = [until_stop(greedy(folder, text, 4), ["\n"]) for text in texts]
    assert len(set(expected)) > 1
    rows, head = answers(folder, texts, ["x"] * len(texts))
    model, preprocess = FAMILY.load(folder), FAMILY.preprocessor(folder, head.spec.most_read)
    # Settings of the model itself must not count.
    NamedModel.of(model).inner.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, min_new_tokens=9, num_beams=2
    )
    with torch.inference_mode():
        found = FAMILY.generate(model, preprocess([rows[n] for n in range(len(rows))]), head)
        assert found == expected
        assert FAMILY.generate(model, preprocess([rows[1]]), head) == [expected[1]]


def test_what_all_prompts_begin_with_goes_through_the_model_once(folders):
    folder, texts = folders["llama"], ["b" * 40 + "a" * n for n in (1, 2, 3)]
    rows, head = answers(folder, texts, ["x"] * 3)
    model, seen = FAMILY.load(folder), []
    NamedModel.of(model).inner.model.embed_tokens.register_forward_pre_hook(
        lambda _, inputs: seen.append(tuple(inputs[0].shape))
    )
    with torch.inference_mode():
        FAMILY.generate(
            model, FAMILY.preprocessor(folder)([*map(rows.__getitem__, range(3))]), head
        )
    assert seen[:3] == [(1, 40), (3, 3), (3, 1)]


def test_a_generated_answer_is_compared_with_the_right_one(folders):
    folder = folders["llama"]
    written = [greedy(folder, text, 4) for text in TEXTS]
    several = ["something else", written[2]]
    right = [f" {written[0]}\n", "something else", several, written[3]]
    rows, head = answers(folder, TEXTS, right)
    found = evaluate(
        FAMILY,
        FAMILY.load(folder),
        head,
        rows,
        FAMILY.preprocessor(folder, head.spec.most_read),
        metric="exact_match",
    )
    assert isinstance(found.rows, Bits)
    assert found.rows.right.tolist() == [True, False, True, True]


def test_predictions_are_those_at_spaced_positions_of_the_answer(folders):
    folder = folders["llama"]
    rows, head = answers(folder, TEXTS[:2], ["one", "a b c d e f g h i j k l"])
    model, preprocess = FAMILY.load(folder), FAMILY.preprocessor(folder)
    batch = preprocess([rows[0], rows[1]])
    with torch.inference_mode():
        found = FAMILY.predictions(model, batch, head)
    assert found.shape[:2] == (2, 8)
    assert batch["answer_length"][0].item() == 4
    assert bool((found[0, 0::2] == found[0, 1::2]).all()), "four tokens, each predicted twice"
    assert not bool((found[0, 0] == found[0, 2]).all())
    assert not bool((found[1, 0] == found[1, 1]).all())
    tokens = batch["answers"][0, 0, :4]
    summed = found[0, 0::2].log_softmax(-1).gather(1, tokens[:, None]).sum().item()
    assert summed == pytest.approx(FAMILY.logits(model, batch, head)[0, 0].item(), abs=1e-4)


def test_the_room_of_a_generated_answer_is_kept_free():
    spec = HeadSpec(prompt="{q}", answer="a", generate=GenerateSpec(max_new_tokens=10))
    assert spec.model_copy(update={"max_length": 64}).most_read == 54


def test_an_answer_that_leaves_no_room_for_a_prompt_is_refused(folders):
    spec = HeadSpec(prompt="{q}", answer="a", generate=GenerateSpec(max_new_tokens=5000))
    with pytest.raises(BadInput, match="max_new_tokens leaves no room for a prompt"):
        FAMILY.resolve(folders["llama"], spec)


def test_a_text_ends_before_the_first_stop():
    assert until_stop("a b\nc;d", [";", "\n"]) == "a b"
    assert until_stop("a b", ["\n"]) == "a b"
