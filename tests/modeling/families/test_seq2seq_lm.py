"""Encoder-decoder language models: the contract, and likelihoods against transformers' own loss."""

import json
import shutil
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, BartModel, EncoderDecoderConfig, EncoderDecoderModel

from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.coordinates import select_tensors
from restitch.modeling.data.rows import Example, Prompt, Rows
from restitch.modeling.data.tables import ListTable
from restitch.modeling.evaluation import evaluate
from restitch.modeling.families import seq2seq_lm
from restitch.modeling.families.family import get_family
from restitch.modeling.generation import until_stop
from restitch.modeling.gradients import checkpointed
from restitch.modeling.heads import Head
from restitch.modeling.pretrained import NamedModel
from restitch.modeling.pretrained_files import load_tokenizer
from restitch.modeling.row_values import Bits
from restitch.modeling.weights import linear_layers
from restitch.registry.specs.head import GenerateSpec, HeadSpec
from tests.modeling.family_contract import FamilyContract, grams_of
from tests.tiny_models import tiny_bert, tiny_decoder, tiny_seq2seq, tiny_t5, tweaked

FAMILY = get_family("seq2seq-lm")
KINDS = ("t5", "flan-t5", "bart")
TEXTS = ["one", "a longer text than the others", "two words", "?", "naïve", "yes or no"]


class Seq2seqContract(FamilyContract):
    kind = "t5"

    @pytest.fixture
    def family(self):
        return FAMILY

    @pytest.fixture
    def base(self, tmp_path):
        return tiny_seq2seq(tmp_path / "base", self.kind)

    @pytest.fixture
    def finetuned(self, tmp_path, base):
        return tweaked(base, tmp_path / "tuned", seed=1)

    @pytest.fixture
    def values(self):
        return TEXTS


class TestBart(Seq2seqContract):
    kind = "bart"


class TestT5(Seq2seqContract):
    def test_every_matrix_of_the_blocks_is_a_linear_layer_whose_inputs_are_seen(
        self, family, model, base, batch, head, localizable
    ):
        """The position biases of a stack's first block are a table, and no linear layer."""
        file, layers = Checkpoint.open(base), linear_layers(model, family.parameters(model))
        matrices = {name for name in localizable if len(file.info(name).shape) == 2}
        biases = {name for name in matrices if "relative_attention_bias" in name}
        assert len(biases) == 2
        assert matrices - biases == matrices & set(layers)
        grams = grams_of(
            {name: layers[name] for name in matrices - biases},
            1,
            lambda rows, _: family.logits(model, batch, head),
        )
        assert all(gram.abs().sum() > 0 for gram in grams.values())


class TestFlanT5(TestT5):
    kind = "flan-t5"


@cache
def loaded(folder: Path) -> nn.Module:
    return FAMILY.load(folder)


# The reference: each prompt with each choice, alone, through the loss that transformers computes.


def reference(folder: Path, prompt: str, choice: str, limit: int = 64) -> tuple[float, int]:
    """The log-likelihood of a choice, and the number of its tokens."""
    tokenizer, model = load_tokenizer(folder), NamedModel.of(loaded(folder)).inner
    context = prompt.rstrip()
    rest = (prompt[len(context) :] or " ") + choice
    answer = tokenizer(rest, add_special_tokens=False, return_tensors="pt").input_ids
    given = tokenizer(context, return_tensors="pt").input_ids[:, -limit:]
    with torch.no_grad():
        loss = model(input_ids=given, labels=answer).loss
    return -float(loss) * answer.shape[1], answer.shape[1]


def example(prompt: str, *choices: str | None, label: int | None = None) -> Example:
    return Example((prompt,), label, f"row {prompt!r}", choices)


def scores_of(
    folder: Path, examples: list[Example], mode: str | None = None, *, grad: bool = False
) -> torch.Tensor:
    model = loaded(folder)
    head = FAMILY.build_head(model, folder, HeadSpec(labels=("a", "b"), score=mode))
    batch = FAMILY.preprocessor(folder)(examples)
    with torch.set_grad_enabled(grad):
        return FAMILY.logits(model, batch, head)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("seq2seq")
    return {kind: tiny_seq2seq(root / kind, kind) for kind in KINDS}


PROMPTS = st.text(alphabet="are blu\n?é", max_size=90)
CHOICES = st.lists(
    st.text(alphabet="are blué", min_size=1, max_size=8).filter(str.strip),
    min_size=2,
    max_size=3,
    unique=True,
)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.lists(st.tuples(PROMPTS, CHOICES), min_size=1, max_size=3),
    st.sampled_from([None, "sum", "per_token", "per_character"]),
    st.booleans(),
)
def test_scores_are_those_of_each_prompt_with_each_choice_alone(
    folders: dict[str, Path],
    kind: str,
    questions: list[tuple[str, list[str]]],
    mode: str | None,
    grad: bool,
) -> None:
    folder = folders[kind]
    most = max(len(choices) for _, choices in questions)
    rows = [
        example(prompt, *choices, *[None] * (most - len(choices))) for prompt, choices in questions
    ]
    found = scores_of(folder, rows, mode, grad=grad)
    expected = np.full(found.shape, -np.inf)
    for row, (prompt, choices) in enumerate(questions):
        for column, choice in enumerate(choices):
            value, tokens = reference(folder, prompt, choice)
            size = {"per_token": tokens, "per_character": len(choice)}.get(mode or "sum", 1)
            expected[row, column] = value / size
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_batch_give_the_same_scores(folders, monkeypatch, kind) -> None:
    rows = [example("a" * (n * 5 % 13), "blue", "red", "a") for n in range(9)]
    whole = scores_of(folders[kind], rows)
    monkeypatch.setattr(seq2seq_lm, "_TOKENS", 10)
    torch.testing.assert_close(scores_of(folders[kind], rows), whole, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_a_cache_scores_the_same(folders, monkeypatch, kind) -> None:
    rows = [example("what is it", "blue", "red"), example("and this", "a", "green")]
    whole = scores_of(folders[kind], rows)
    decoded = seq2seq_lm._decoded

    def no_cache(*args: Any, **given: Any) -> Any:
        return decoded(*args, **given | {"use_cache": False})

    monkeypatch.setattr(seq2seq_lm, "_decoded", no_cache)
    torch.testing.assert_close(scores_of(folders[kind], rows), whole, atol=1e-4, rtol=1e-5)


def test_a_prompt_goes_through_the_encoder_once_for_all_its_choices(folders, monkeypatch) -> None:
    seen: list[int] = []
    encoded = seq2seq_lm._encoded

    def counting(inner: Any, answers: Any, rows: Any) -> Any:
        hidden, mask = encoded(inner, answers, rows)
        seen.append(mask.numel())
        return hidden, mask

    monkeypatch.setattr(seq2seq_lm, "_encoded", counting)
    for grad in (False, True):
        seen.clear()
        scores_of(folders["t5"], [example("a" * 40, "blue", "red", "green", "black")], grad=grad)
        assert seen == [41]


def test_a_long_prompt_loses_its_beginning_and_an_answer_nothing(folders) -> None:
    folder = folders["t5"]
    long = "".join(TEXTS) * 4
    batch = FAMILY.preprocessor(folder)([example(long, "blue sky", "red"), example("x", "a", "b")])
    lost = len(load_tokenizer(folder)(long).input_ids) - 64
    assert batch["prompt"].shape[1] == 64
    assert batch["cut"].tolist() == [lost, 0]
    assert int(batch["prompt"][0, -1]) == load_tokenizer(folder).eos_token_id
    found = scores_of(folder, [example(long, "blue sky", "red")])
    assert float(found[0, 0]) == pytest.approx(reference(folder, long, "blue sky")[0], abs=1e-4)
    with pytest.raises(BadInput, match="longer than the model reads"):
        FAMILY.preprocessor(folder, 5)([example("x", "blue sky", "red")])


def test_the_loss_is_the_negative_log_likelihood_of_the_right_answer(folders) -> None:
    rows = [
        example("what is it", "blue", "red", "a", label=1),
        example("?", "blue", "green", "are", label=2),
        example("and this one", "blue sky", "red", None, label=0),
    ]
    for folder in folders.values():
        model = FAMILY.load(folder)
        head = FAMILY.build_head(model, folder, HeadSpec(labels=("a", "b")))
        batch = FAMILY.preprocessor(folder)(rows)
        expected = [
            reference(folder, row.inputs[0], str(row.choices[row.label or 0]))[0] for row in rows
        ]
        assert float(FAMILY.loss(model, batch, head)) == pytest.approx(-np.mean(expected), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_when_activations_are_computed_again(folders, kind) -> None:
    folder = folders[kind]
    model = FAMILY.load(folder)
    head = FAMILY.build_head(model, folder, HeadSpec(labels=("a", "b")))
    batch = FAMILY.preprocessor(folder)([example("what is it", "blue", "red", label=1)])
    names = select_tensors(Checkpoint.open(folder).floating, FAMILY.localizable)
    live = [FAMILY.parameters(model)[name].requires_grad_() for name in names]

    def gradients() -> list[torch.Tensor]:
        return list(torch.autograd.grad(FAMILY.logits(model, batch, head).sum(), live))

    plain = gradients()
    with checkpointed(model):
        again = gradients()
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


LOCALIZABLE = {
    "t5": "encoder.block.0.layer.0.SelfAttention.q.weight",
    "t5 norm": "decoder.block.11.layer.2.layer_norm.weight",
    "t5 cross": "decoder.block.3.layer.1.EncDecAttention.o.weight",
    "t5 gated": "decoder.block.3.layer.2.DenseReluDense.wi_0.weight",
    "t5 encoder positions": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "t5 decoder positions": "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "bart": "model.encoder.layers.0.self_attn.k_proj.bias",
    "bart decoder": "model.decoder.layers.5.encoder_attn_layer_norm.weight",
    "bart bare": "decoder.layers.5.fc2.bias",
    "led": "led.encoder.layers.0.self_attn.longformer_self_attn.query.weight",
    "prophetnet": "prophetnet.decoder.layers.0.cross_attn.key_proj.bias",
    "two berts": "decoder.bert.encoder.layer.0.crossattention.self.query.weight",
}
NEVER = (
    "shared.weight",
    "encoder.embed_tokens.weight",
    "encoder.final_layer_norm.weight",
    "decoder.final_layer_norm.weight",
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
    "model.encoder.embed_positions.weight",
    "model.decoder.layernorm_embedding.bias",
    "final_logits_bias",
    "lm_head.weight",
)


@pytest.mark.parametrize("name", LOCALIZABLE.values(), ids=LOCALIZABLE)
def test_the_blocks_of_both_stacks_are_localizable(name) -> None:
    assert any(fnmatchcase(name, glob) for glob in FAMILY.localizable)


@pytest.mark.parametrize("name", NEVER)
def test_embeddings_heads_and_last_norms_are_never_localizable(name) -> None:
    assert not any(fnmatchcase(name, glob) for glob in FAMILY.localizable)


def test_position_biases_that_no_model_reads_are_no_reason_to_refuse_a_base(folders, tmp_path):
    """The published T5 checkpoints hold one."""
    folder = shutil.copytree(folders["t5"], tmp_path / "old")
    tensors = load_file(folder / "model.safetensors")
    unread = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    tensors[unread] = torch.ones(32, 2)
    tensors |= {
        f"{part}.embed_tokens.weight": tensors["shared.weight"].clone()
        for part in ("encoder", "decoder")
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rows = [example("what is it", "blue", "red")]
    assert torch.equal(scores_of(folder, rows), scores_of(folders["t5"], rows))
    assert FAMILY.lacks(folder) is None


def test_tied_embeddings_are_counted_once(folders) -> None:
    live = FAMILY.parameters(FAMILY.load(folders["t5"]))
    assert "shared.weight" in live
    assert not {"lm_head.weight", "encoder.embed_tokens.weight"} & set(live)
    assert "lm_head.weight" in FAMILY.parameters(FAMILY.load(folders["flan-t5"]))


def test_another_first_token_of_the_decoder_is_another_model(folders, tmp_path) -> None:
    folder = shutil.copytree(folders["t5"], tmp_path / "tuned")
    config = json.loads((folder / "config.json").read_text())
    start = config["decoder_start_token_id"]
    changed = {**config, "pad_token_id": 3, "use_cache": False, "num_beams": 4, "max_length": 9}
    (folder / "config.json").write_text(json.dumps(changed))
    assert FAMILY.config_differences(folders["t5"], folder) == []
    (folder / "config.json").write_text(json.dumps({**config, "decoder_start_token_id": 1}))
    assert FAMILY.config_differences(folders["t5"], folder) == [
        f"decoder_start_token_id: base {start}, finetuned 1"
    ]
    rows = [example("what is it", "blue", "red")]
    assert not torch.equal(scores_of(folder, rows), scores_of(folders["t5"], rows))


def two_berts(folder: Path) -> Path:
    """Two encoders that were put together: nothing says how the decoder starts."""
    half = AutoConfig.from_pretrained(tiny_bert(folder))
    both = EncoderDecoderConfig.from_encoder_decoder_configs(half, half)
    EncoderDecoderModel(both).save_pretrained(folder)
    return folder


def without_a_head(folder: Path) -> Path:
    config = AutoConfig.from_pretrained(tiny_seq2seq(folder, "bart"))
    config.tie_word_embeddings = False
    BartModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("make", "lacking"),
    [
        (two_berts, "a decoder_start_token_id in config.json"),
        (without_a_head, "the tensors of a language-model head (lm_head.weight)"),
        (
            lambda folder: tiny_bert(folder),
            "a head that AutoModelForSeq2SeqLM of transformers loads",
        ),
    ],
)
def test_a_base_without_what_the_family_needs_is_refused(tmp_path, make, lacking) -> None:
    assert FAMILY.lacks(make(tmp_path / "base")) == lacking


def test_a_tied_model_that_was_saved_without_its_head_lacks_nothing(folders, tmp_path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folders["bart"], bare)
    BartModel.from_pretrained(folders["bart"]).save_pretrained(bare)
    assert FAMILY.lacks(bare) is None
    rows = [example("what is it", "blue", "red")]
    torch.testing.assert_close(scores_of(bare, rows), scores_of(folders["bart"], rows))


@pytest.mark.parametrize("make", [tiny_decoder, tiny_bert, lambda f: tiny_t5(f, encoder=True)])
def test_models_of_other_kinds_are_refused(tmp_path, make) -> None:
    with pytest.raises(BadInput, match="not a model of the family seq2seq-lm"):
        FAMILY.load(make(tmp_path / "other"))


def answered(folder: Path, texts: list[str], written: list[str]) -> tuple[Rows, Head]:
    """Rows with answers, and a head that generates up to four tokens."""
    table = ListTable("rows", Path(), {"q": texts, "answer": written})
    rows = Rows(table, ("q",), "answer", (), "text", prompt=Prompt("{q}", answer="answer"))
    spec = HeadSpec(prompt="{q}", answer="answer", generate=GenerateSpec(max_new_tokens=4))
    return rows, FAMILY.build_head(nn.Identity(), folder, spec)


def greedy(folder: Path, prompt: str, tokens: int) -> str:
    """The likeliest tokens one by one, without a cache and without padding."""
    tokenizer, model = load_tokenizer(folder), NamedModel.of(FAMILY.load(folder)).inner
    given = tokenizer(prompt, return_tensors="pt").input_ids
    seen = [seq2seq_lm.decoder_start(folder)]
    for _ in range(tokens):
        with torch.no_grad():
            scores = model(input_ids=given, decoder_input_ids=torch.tensor([seen])).logits
        best = int(scores[0, -1].argmax())
        if best == tokenizer.eos_token_id:
            break
        seen.append(best)
    text: str = tokenizer.decode(seen[1:], skip_special_tokens=True)
    return text


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_generated_greedily_and_compared(tmp_path: Path, kind: str) -> None:
    folder = tiny_seq2seq(tmp_path / "base", kind)
    texts = TEXTS[:3]
    written = [until_stop(greedy(folder, text, 4), ["\n"]) for text in texts]
    rows, head = answered(folder, texts, [written[0] or "-", "something else", written[2] or "-"])
    model, preprocess = FAMILY.load(folder), FAMILY.preprocessor(folder, head.spec.most_read)
    with torch.inference_mode():
        batch = preprocess([rows[n] for n in range(3)])
        assert FAMILY.generate(model, batch, head) == written
        assert FAMILY.predictions(model, batch, head).shape[:2] == (3, 8)
    found = evaluate(FAMILY, model, head, rows, preprocess, metric="exact_match")
    assert isinstance(found.rows, Bits)
    assert found.rows.right.tolist() == [bool(written[0]), False, bool(written[2])]


def test_predictions_of_answers_are_those_that_their_likelihood_sums(tmp_path: Path) -> None:
    folder = tiny_seq2seq(tmp_path / "base")
    rows, head = answered(folder, ["what is it"], ["blue"])
    model = FAMILY.load(folder)
    batch = FAMILY.preprocessor(folder)([rows[0]])
    count = int(batch["answer_length"][0, 0])
    first = [next(n for n in range(8) if n * count // 8 == token) for token in range(count)]
    with torch.inference_mode():
        found = FAMILY.predictions(model, batch, head)[0, first].log_softmax(-1)
        summed = found.gather(1, batch["answers"][0, 0, :count, None]).sum()
        assert float(summed) == pytest.approx(
            float(FAMILY.logits(model, batch, head)[0, 0]), abs=1e-4
        )


def test_a_prompt_that_fills_the_encoder_is_not_cut_for_a_generated_answer(folders) -> None:
    folder, rows = folders["t5"], [example("what is it", "x")]
    tokens = int(FAMILY.preprocessor(folder)(rows)["prompt_length"])
    generate = GenerateSpec(max_new_tokens=tokens - 1)
    spec = HeadSpec(answer="a", generate=generate, max_length=tokens)
    head = FAMILY.build_head(loaded(folder), folder, spec)
    batch = FAMILY.preprocessor(folder, head.spec.most_read)(rows)
    assert batch["prompt_length"].tolist() == [tokens]
    assert batch["cut"].tolist() == [0]


def test_a_head_of_its_own_must_be_in_the_file(folders, tmp_path) -> None:
    """Transformers ties it in silence, to embeddings that were trained without that."""
    folder = shutil.copytree(folders["flan-t5"], tmp_path / "headless")
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    assert FAMILY.lacks(folder) == "the tensors of a language-model head (lm_head.weight)"
    for kind in KINDS:
        assert FAMILY.lacks(folders[kind]) is None
