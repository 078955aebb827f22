"""Causal language models: the contract, and likelihoods against a slow reference."""

import json
import shutil
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.coordinates import select_tensors
from restitch.modeling.data.rows import Example, Prompt, Rows
from restitch.modeling.data.tables import ListTable
from restitch.modeling.evaluation import evaluate
from restitch.modeling.families import causal_lm
from restitch.modeling.families.family import get_family
from restitch.modeling.gradients import checkpointed
from restitch.modeling.heads import Head
from restitch.modeling.pretrained import NamedModel
from restitch.modeling.pretrained_files import load_tokenizer
from restitch.modeling.row_values import Bits
from restitch.modeling.weights import linear_layers
from restitch.registry.specs.head import HeadSpec
from tests.modeling.family_contract import FamilyContract
from tests.tiny_models import RECURRENT, decoder_of, tiny_bert, tiny_decoder, tiny_experts, tweaked

FAMILY = get_family("causal-lm")
KINDS = ("llama", "gpt2", "qwen2")
TEXTS = ["one", "a longer text than the others", "two words", "?", "naïve", "yes or no"]


class CausalContract(FamilyContract):
    kind = "llama"

    @pytest.fixture
    def family(self):
        return FAMILY

    @pytest.fixture
    def base(self, tmp_path):
        return tiny_decoder(tmp_path / "base", self.kind)

    @pytest.fixture
    def finetuned(self, tmp_path, base):
        return tweaked(base, tmp_path / "tuned", seed=1)

    @pytest.fixture
    def values(self):
        return TEXTS


class TestLlama(CausalContract):
    pass


class TestQwen2(CausalContract):
    kind = "qwen2"


class TestGpt2(CausalContract):
    kind = "gpt2"

    def test_every_matrix_of_the_blocks_is_a_linear_layer_whose_inputs_are_seen(
        self, family, model, base, batch, head, localizable
    ):
        """GPT-2 has transposed matrices, `Conv1D`, whose inputs are not measured."""
        layers = linear_layers(model, family.parameters(model))
        assert not set(layers) & set(localizable)


class ExpertsContract(CausalContract):
    """Models whose experts are matrices of their own in the file, and joined in the model."""

    @pytest.fixture
    def base(self, tmp_path):
        return tiny_experts(tmp_path / "base", self.kind)

    def test_every_matrix_of_the_blocks_is_a_linear_layer_whose_inputs_are_seen(
        self, family, model, base, batch, head, localizable
    ):
        """All but those of what chooses the experts."""
        layers, file = linear_layers(model, family.parameters(model)), Checkpoint.open(base)
        matrices = {name for name in localizable if len(file.info(name).shape) == 2}
        unseen = matrices - layers.keys()
        assert unseen
        assert all(name.endswith(".gate.weight") for name in unseen)


class TestMixtral(ExpertsContract):
    kind = "mixtral"

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("experts_implementation", "deepgemm"),
            ("_experts_implementation", "eager"),
            ("router_aux_loss_coef", 0.5),
            ("output_router_logits", True),
        ],
    )
    def test_keys_of_training_and_of_kernels_change_nothing(
        self, family, base, model, batch, head, tmp_path, key, value
    ):
        other = shutil.copytree(base, tmp_path / "other")
        config = json.loads((base / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | {key: value}))
        assert family.config_differences(base, other) == []
        found = family.load(other)
        assert found.inner.config._experts_implementation == "grouped_mm"
        assert torch.equal(family.logits(found, batch, head), family.logits(model, batch, head))


class TestQwen2Moe(ExpertsContract):
    kind = "qwen2_moe"


# The reference: each prompt with each choice, alone, from the texts on.


@cache
def loaded(folder: Path) -> tuple[Any, Any]:
    """The tokenizer and the model of a folder."""
    return load_tokenizer(folder), NamedModel.of(FAMILY.load(folder)).inner


def reference(folder: Path, prompt: str, choice: str, limit: int = 96) -> tuple[float, int]:
    """The log-likelihood of a choice, and the number of its tokens."""
    tokenizer, model = loaded(folder)
    context = prompt.rstrip()
    rest = (prompt[len(context) :] or " ") + choice
    before = tokenizer(context).input_ids
    answer = tokenizer(context + rest).input_ids[len(before) :]
    before = before or [tokenizer.bos_token_id]
    tokens = [*before, *answer][-(limit + 1) :]
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([tokens[:-1]])).logits[0].double().log_softmax(-1)
    places = range(len(tokens) - 1 - len(answer), len(tokens) - 1)
    return float(sum(scores[at, token] for at, token in zip(places, answer, strict=True))), len(
        answer
    )


def example(prompt: str, *choices: str | None, label: int | None = None) -> Example:
    return Example((prompt,), label, f"row {prompt!r}", choices)


def scores_of(
    folder: Path, examples: list[Example], mode: str | None = None, *, grad: bool = False
) -> torch.Tensor:
    model = FAMILY.load(folder)
    spec = HeadSpec(labels=("a", "b"), score=mode)
    head = FAMILY.build_head(model, folder, spec)
    batch = FAMILY.preprocessor(folder)(examples)
    with torch.set_grad_enabled(grad):
        return FAMILY.logits(model, batch, head)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("decoders")
    return {
        f"{kind}{'-bos' if bos else ''}": tiny_decoder(root / f"{kind}{bos}", kind, bos=bos)
        for kind in KINDS
        for bos in (False, True)
    }


PROMPTS = st.text(alphabet="are blu\n?é", max_size=30)
CHOICES = st.lists(
    st.text(alphabet="are blué", min_size=1, max_size=8).filter(str.strip),
    min_size=2,
    max_size=4,
    unique=True,
)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([*KINDS, *(f"{kind}-bos" for kind in KINDS)]),
    PROMPTS,
    st.lists(st.tuples(PROMPTS, CHOICES), min_size=1, max_size=6),
    st.sampled_from([None, "sum", "per_token", "per_character"]),
    st.booleans(),
    st.sampled_from([1, 64]),
)
def test_scores_are_those_of_each_prompt_with_each_choice_alone(
    folders: dict[str, Path],
    kind: str,
    beginning: str,
    questions: list[tuple[str, list[str]]],
    mode: str | None,
    grad: bool,
    worth: int,
) -> None:
    folder = folders[kind]
    questions = [(beginning + prompt, choices) for prompt, choices in questions]
    most = max(len(choices) for _, choices in questions)
    rows = [
        example(prompt, *choices, *[None] * (most - len(choices))) for prompt, choices in questions
    ]
    with patch.object(causal_lm, "_WORTH_A_PASS", worth):
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
def test_neither_order_nor_batches_matter(folders: dict[str, Path], kind: str) -> None:
    rows = [example(text * n, "blue", "red", "a") for text in TEXTS for n in (1, 2, 3)]
    together = scores_of(folders[kind], rows)
    assert torch.equal(together, scores_of(folders[kind], rows))
    backwards = scores_of(folders[kind], rows[::-1]).flip(0)
    alone = torch.cat([scores_of(folders[kind], [row]) for row in rows])
    torch.testing.assert_close(backwards, together, atol=1e-4, rtol=0)
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=0)


def test_a_prompt_goes_through_the_model_once_for_all_its_choices(folders, monkeypatch) -> None:
    seen: list[int] = []
    forward = causal_lm._forward

    def counting(inner: Any, tokens: torch.Tensor, keep: int, **given: Any) -> Any:
        seen.append(tokens.numel())
        return forward(inner, tokens, keep, **given)

    monkeypatch.setattr(causal_lm, "_forward", counting)
    prompt = "a" * 50
    one_token = scores_of(folders["llama"], [example(prompt, "a", "re")])
    assert one_token.isfinite().all()
    assert seen == [50]
    seen.clear()
    scores_of(folders["llama"], [example(prompt, "blue", "red", "green", "black")])
    assert sum(seen) < 80


def test_parts_of_a_batch_give_the_same_scores(folders, monkeypatch) -> None:
    rows = [example("a" * (n % 3 + 5), "blue", "red", "green") for n in range(9)]
    whole = scores_of(folders["qwen2"], rows)
    monkeypatch.setattr(causal_lm, "_TOKENS", 10)
    monkeypatch.setattr(causal_lm, "SCORED", 2)
    torch.testing.assert_close(scores_of(folders["qwen2"], rows), whole, atol=1e-4, rtol=0)


def test_prompts_of_other_lengths_go_together_where_padding_has_no_effect(
    folders, monkeypatch
) -> None:
    parts: list[int] = []
    forward = causal_lm._forward

    def counting(inner: Any, tokens: torch.Tensor, keep: int, **given: Any) -> Any:
        parts.append(len(tokens))
        return forward(inner, tokens, keep, **given)

    monkeypatch.setattr(causal_lm, "_forward", counting)
    rows = [example("a" * (n + 5), "blue", "red", "green") for n in range(6)]
    for kind in KINDS:
        parts.clear()
        whole = scores_of(folders[kind], rows)
        assert parts == [6, 18], "prompts at once, and then their longer answers"
        with monkeypatch.context() as patched:
            patched.setattr(causal_lm, "_can_pad", lambda _: False)
            parts.clear()
            torch.testing.assert_close(scores_of(folders[kind], rows), whole, atol=1e-4, rtol=0)
            assert parts == [1, 3] * 6


def test_what_all_prompts_begin_with_goes_through_the_model_once(folders, monkeypatch) -> None:
    seen: list[tuple[int, ...]] = []
    forward = causal_lm._forward

    def counting(inner: Any, tokens: torch.Tensor, keep: int, **given: Any) -> Any:
        seen.append(tuple(tokens.shape))
        return forward(inner, tokens, keep, **given)

    monkeypatch.setattr(causal_lm, "_forward", counting)
    rows = [example("b" * 40 + "a" * n, "a", "re") for n in range(1, 9)]
    scores_of(folders["llama"], rows)
    assert seen == [(1, 40), (8, 8)], "the last token of the shortest prompt is not shared"
    seen.clear()
    scores_of(folders["llama"], [example("b" + "a" * n, "a", "re") for n in (1, 2, 3)])
    assert seen == [(3, 4)], "another pass costs more than six tokens"


# GPT-Neo's windows are in its masks, Mistral's in its cache. Falcon-H1 has both a state and keys in
# each layer. RecurrentGemma keeps its states in its layers, and padding changes them.
OTHER_KINDS: dict[str, dict[str, Any]] = {
    "gpt_neo": {
        "num_layers": 2,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 12,
    },
    "mistral": {"sliding_window": 12},
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 4,
        "head_dim": 4,
    },
    "recurrent_gemma": RECURRENT,
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_windows_and_states_see_each_prompt_as_if_it_were_alone(kind, tmp_path) -> None:
    folder = decoder_of(tmp_path, kind, **OTHER_KINDS[kind])
    beginning = "blue are " * 6
    prompts = [beginning * (n % 3 > 0) + "a bar " * (n % 4) + "re" for n in range(7)]
    prompts += [beginning + prompt for prompt in prompts]
    for some in (prompts, prompts[7:]):
        found = scores_of(folder, [example(prompt, "blue", "red are", "a") for prompt in some])
        expected = [
            [reference(folder, prompt, choice, 200)[0] for choice in ("blue", "red are", "a")]
            for prompt in some
        ]
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-4, rtol=1e-5)


def test_a_model_without_a_cache_of_rows_scores_the_same(folders, monkeypatch) -> None:
    rows = [example("what is it", "blue", "red"), example("and this", "a", "green")]
    whole = scores_of(folders["gpt2"], rows)
    monkeypatch.setattr(causal_lm, "_can_select", lambda _: False)
    torch.testing.assert_close(scores_of(folders["gpt2"], rows), whole, atol=1e-4, rtol=0)


def test_a_long_prompt_loses_its_beginning_and_an_answer_nothing(folders) -> None:
    folder = folders["llama-bos"]
    long = "".join(TEXTS) * 4
    batch = FAMILY.preprocessor(folder)([example(long, "blue sky", "red"), example("x", "a", "b")])
    assert batch["prompt"].shape[1] + int(batch["answer_length"].max()) == 96 + 1
    lost = len(load_tokenizer(folder)(long).input_ids) - batch["prompt"].shape[1]
    assert batch["cut"].tolist() == [lost, 0]
    found = scores_of(folder, [example(long, "blue sky", "red")])
    assert float(found[0, 0]) == pytest.approx(reference(folder, long, "blue sky")[0], abs=1e-4)
    short = FAMILY.preprocessor(folder, 12)([example(long, "blue sky", "red")])
    assert short["prompt"].shape[1] + int(short["answer_length"].max()) == 13
    with pytest.raises(BadInput, match="longer than the model reads"):
        FAMILY.preprocessor(folder, 5)([example("x", "blue sky", "red")])


def test_bos_comes_first_only_if_the_tokenizer_puts_it_there(folders) -> None:
    rows = [example("are", "a", "b"), example("<s>are", "a", "b"), example("", "a", "b")]
    bos = load_tokenizer(folders["llama"]).bos_token_id
    bare = FAMILY.preprocessor(folders["llama"])(rows)["prompt"]
    with_bos = FAMILY.preprocessor(folders["llama-bos"])(rows)["prompt"]
    assert (bare[:, 0] == bos).tolist() == [False, True, True]
    assert (with_bos[:, 0] == bos).tolist() == [True, True, True]
    assert torch.equal(with_bos[0], with_bos[1])


@pytest.mark.parametrize("prompt", ["is it:", "is it: ", "is it:\n", "is it:  "])
def test_white_space_before_the_answer_is_part_of_it(folders, prompt) -> None:
    batch = FAMILY.preprocessor(folders["llama"])([example(prompt, "are", "blu")])
    tokenizer = load_tokenizer(folders["llama"])
    length = int(batch["answer_length"][0, 0])
    space = prompt[len(prompt.rstrip()) :] or " "
    assert tokenizer.decode(batch["answers"][0, 0, :length]) == f"{space}are"
    assert tokenizer.decode(batch["prompt"][0]) == "is it:"


def test_the_loss_is_the_negative_log_likelihood_of_the_right_answer(folders) -> None:
    folder = folders["qwen2"]
    rows = [
        example("what is it", "blue", "red", "a", label=1),
        example("?", "blue", "green", "are", label=2),
        example("and this one", "blue sky", "red", None, label=0),
    ]
    model = FAMILY.load(folder)
    head = FAMILY.build_head(model, folder, HeadSpec(labels=("a", "b")))
    batch = FAMILY.preprocessor(folder)(rows)
    likelihoods = FAMILY.logits(model, batch, head)
    expected = -likelihoods[range(3), batch["labels"]].mean()
    torch.testing.assert_close(FAMILY.loss(model, batch, head), expected)


def test_gradients_are_the_same_when_activations_are_computed_again(folders) -> None:
    folder = folders["llama"]
    model = FAMILY.load(folder)
    head = FAMILY.build_head(model, folder, HeadSpec(labels=("a", "b")))
    batch = FAMILY.preprocessor(folder)([example("what is it", "blue", "red", label=1)])
    live = [p.requires_grad_() for p in FAMILY.parameters(model).values()]

    def gradients() -> list[torch.Tensor]:
        return list(torch.autograd.grad(FAMILY.logits(model, batch, head).sum(), live))

    plain = gradients()
    with checkpointed(model):
        again = gradients()
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_rows_with_fewer_choices_are_evaluated_by_those_they_have(folders) -> None:
    folder = folders["llama"]
    choices = [["blue", "red"], ["a", "green", "are"], ["black", "white"]]
    prompts = ["what is it", "and this", "or that"]
    table = ListTable("rows", Path(), {"q": prompts, "c": choices, "y": [0, 2, 1]})
    rows = Rows(table, ("q",), "y", (), "text", prompt=Prompt("Q {q}\nA", "c"))
    model = FAMILY.load(folder)
    head = FAMILY.build_head(model, folder, HeadSpec(choices_column="c", prompt="Q {q}\nA"))
    found = evaluate(FAMILY, model, head, rows, FAMILY.preprocessor(folder), batch_size=2)
    best = [
        int(np.argmax([reference(folder, f"Q {prompt}\nA", one)[0] for one in own]))
        for prompt, own in zip(prompts, choices, strict=True)
    ]
    assert isinstance(found.rows, Bits)
    assert found.rows.right.tolist() == [b == y for b, y in zip(best, [0, 2, 1], strict=True)]


def test_choices_with_the_same_tokens_are_refused(tmp_path) -> None:
    preprocess = FAMILY.preprocessor(tiny_decoder(tmp_path / "base"))
    with pytest.raises(BadInput, match="'b' has the tokens of another choice") as caught:
        preprocess([example("x", "a", "b", "b")])
    assert "row 'x'" in str(caught.value)


def test_a_choice_that_the_tokenizer_drops_is_refused(tmp_path) -> None:
    folder = tiny_decoder(tmp_path / "base")
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": " \u200b"}, "content": ""}
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(BadInput, match=r"the choice '\\u200b' has no tokens"):
        FAMILY.preprocessor(folder)([example("x", "a", "\u200b")])


def test_the_length_is_the_smaller_of_tokenizer_and_positions(folders, tmp_path) -> None:
    assert FAMILY.max_length(folders["llama"]) == 96
    assert FAMILY.max_length(folders["gpt2"]) == 96
    folder = shutil.copytree(folders["llama"], tmp_path / "short")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 10}))
    assert FAMILY.max_length(folder) == 10


def test_a_head_names_how_answers_are_compared(folders) -> None:
    folder = folders["llama"]
    assert FAMILY.resolve(folder, HeadSpec(labels=("a", "b"))).score == "sum"
    heads = [
        FAMILY.build_head(FAMILY.load(folder), folder, HeadSpec(labels=("a", "b"), score=mode))
        for mode in ("sum", "per_token", "per_character")
    ]
    assert len({head.to_bytes() for head in heads}) == 3


LOCALIZABLE = {
    "llama": "model.layers.2.mlp.up_proj.weight",
    "norm": "model.layers.0.input_layernorm.weight",
    "qwen2": "model.layers.11.self_attn.q_proj.bias",
    "gpt2": "transformer.h.0.attn.c_attn.bias",
    "gpt2 bare": "h.11.ln_1.bias",
    "gpt_neox": "gpt_neox.layers.3.attention.query_key_value.bias",
    "falcon": "transformer.h.3.ln_attn.bias",
    "opt": "model.decoder.layers.1.fc1.bias",
    "mpt": "transformer.blocks.4.ffn.up_proj.weight",
    "gpt_oss": "model.layers.1.mlp.experts.gate_up_proj",
}
NEVER = (
    "h.0.attn.bias",
    "transformer.h.0.attn.masked_bias",
    "transformer.h.3.attn.attention.bias",
    "gpt_neox.layers.0.attention.bias",
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.embed_tokens.weight",
    "model.norm.weight",
    "transformer.wte.weight",
    "transformer.ln_f.bias",
    "lm_head.weight",
)


@pytest.mark.parametrize("name", LOCALIZABLE.values(), ids=LOCALIZABLE)
def test_the_blocks_of_every_layout_are_localizable(name) -> None:
    assert any(fnmatchcase(name, glob) for glob in FAMILY.localizable)


@pytest.mark.parametrize("name", NEVER)
def test_embeddings_heads_and_buffers_are_never_localizable(name) -> None:
    assert not any(fnmatchcase(name, glob) for glob in FAMILY.localizable)


def test_an_old_gpt2_file_loads_without_a_prefix_and_with_its_masks(folders, tmp_path) -> None:
    folder = shutil.copytree(folders["gpt2"], tmp_path / "old")
    tensors = {
        name.removeprefix("transformer."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 96, 96).tril()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rows = [example("what is it", "blue", "red")]
    assert torch.equal(scores_of(folder, rows), scores_of(folders["gpt2"], rows))
    names = select_tensors(Checkpoint.open(folder).floating, FAMILY.localizable)
    assert set(names) <= set(FAMILY.parameters(FAMILY.load(folder)))
    assert "h.0.attn.bias" not in names


def test_a_tied_head_is_counted_once(folders) -> None:
    live = FAMILY.parameters(FAMILY.load(folders["llama"]))
    assert "model.embed_tokens.weight" in live
    assert "lm_head.weight" not in live
    assert "lm_head.weight" in FAMILY.parameters(FAMILY.load(folders["qwen2"]))


def test_generation_settings_and_chat_template_belong_to_the_model(folders) -> None:
    names = FAMILY.asset_files(folders["llama"])
    assert {"generation_config.json", "chat_template.jinja", "tokenizer.json"} <= set(names)


def test_settings_of_generation_and_padding_change_no_score(folders, tmp_path) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "tuned")
    config = json.loads((folder / "config.json").read_text())
    changed = {**config, "pad_token_id": 3, "use_cache": False, "eos_token_id": 5}
    (folder / "config.json").write_text(json.dumps(changed))
    assert FAMILY.config_differences(folders["llama"], folder) == []
    (folder / "config.json").write_text(json.dumps({**changed, "rms_norm_eps": 0.5}))
    assert FAMILY.config_differences(folders["llama"], folder) == [
        f"rms_norm_eps: base {config['rms_norm_eps']}, finetuned 0.5"
    ]


def test_an_encoder_is_no_language_model(folders, tmp_path) -> None:
    bert = tiny_bert(tmp_path / "bert")
    with pytest.raises(BadInput, match="not a model of the family causal-lm"):
        FAMILY.load(bert)
    assert FAMILY.config_differences(folders["llama"], folders["gpt2"]) == [
        "model_type: base 'llama', finetuned 'gpt2'"
    ]
    t5 = tmp_path / "t5"
    t5.mkdir()
    (t5 / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(BadInput, match="not a model of the family causal-lm") as refused:
        FAMILY.load(t5)
    assert "an encoder-decoder language model" in str(refused.value)


def test_the_head_reads_the_states_of_some_positions_as_one_matrix(folders):
    model = FAMILY.load(folders["llama"])
    seen = []
    head = NamedModel.of(model).inner.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous()))
    spec = HeadSpec(labels=("a", "b"))
    rows = [Example((text,), 0, "", ("red", "blu are")) for text in ("one", "two", "a longer one")]
    with torch.inference_mode():
        FAMILY.logits(model, FAMILY.preprocessor(folders["llama"])(rows), Head({}, spec))
    assert seen
    assert all(seen), "a product with a slice copies the head for each row"
