"""The tensors of an adapter equal those that PEFT merges, for every kind on every architecture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from restitch.merging.adapters.checkpoint import AdapterCheckpoint
from restitch.merging.files.checkpoint import Checkpoint
from restitch.modeling.tensor_names import present_names
from tests.merging.adapters.peft_folders import adapter_on, merged_by_peft
from tests.tiny_models import tiny_bert, tiny_clip, tiny_decoder, tiny_image_model, tiny_seq2seq

MAKERS: dict[str, tuple[Callable[[Path], Path], Any]] = {
    "gpt2": (lambda folder: tiny_decoder(folder, "gpt2"), AutoModelForCausalLM),
    "llama": (tiny_decoder, AutoModelForCausalLM),
    "qwen2": (lambda folder: tiny_decoder(folder, "qwen2"), AutoModelForCausalLM),
    "t5": (lambda folder: tiny_seq2seq(folder, "t5"), AutoModelForSeq2SeqLM),
    "bert": (tiny_bert, AutoModel),
    "clip": (tiny_clip, AutoModel),
    "vit": (tiny_image_model, AutoModel),
}
LINEAR = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj", "up_proj"],
    "t5": ["q", "v", "wi", "wo"],
    "bert": ["query", "value", "dense"],
    "clip": ["q_proj", "v_proj", "fc1", "visual_projection"],
    "vit": ["q_proj", "v_proj", "fc1", "dense"],
}
EMBEDDING = {
    "gpt2": "wte",
    "llama": "embed_tokens",
    "qwen2": "embed_tokens",
    "t5": "shared",
    "bert": "word_embeddings",
    "clip": "token_embedding",
}
FEEDFORWARD = {
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "qwen2": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "t5": (["k", "v", "wo"], ["wo"]),
    "bert": (["key", "value", "output.dense"], ["output.dense"]),
    "clip": (["k_proj", "v_proj", "fc2"], ["fc2"]),
}


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        kind: make(tmp_path_factory.mktemp(kind) / "base") for kind, (make, _) in MAKERS.items()
    }


def live_names(base: Path) -> dict[str, str]:
    """The names in a loaded model of the tensors that are called otherwise in the file."""
    return {name: live for live, name in present_names(base, Checkpoint.open(base), ()).items()}


def opened(base: Path, folder: Path) -> AdapterCheckpoint:
    """The adapter in a folder, on a base."""
    checkpoint = Checkpoint.open(base)
    return AdapterCheckpoint.read(
        folder, checkpoint, aliases=lambda: present_names(base, checkpoint, ())
    )


def check(base: Path, folder: Path, auto_class: Any) -> AdapterCheckpoint:
    """Compare all tensors with those of PEFT; returns the adapter."""
    adapter = opened(base, folder)
    checkpoint, live = adapter.base, live_names(base)
    merged = merged_by_peft(base, folder, auto_class)
    assert set(checkpoint.names) <= set(adapter.names)
    for name in adapter.names:
        own = merged[live.get(name, name)]
        torch.testing.assert_close(adapter.tensor(name), own, rtol=2e-6, atol=2e-6)
        same = name in checkpoint and torch.equal(own, checkpoint.tensor(name))
        assert (name in adapter.touched) or same, f"{name} is changed"
    assert adapter.touched
    return adapter


def check_factors(adapter: AdapterCheckpoint) -> int:
    """Compare the products of the factors with the changes; returns the number of factors."""
    count = 0
    for name in adapter.touched:
        factors = adapter.factors(name)
        if factors is not None:
            count += 1
            change = (adapter.tensor(name) - adapter.base.tensor(name)).flatten(1)
            torch.testing.assert_close(factors.product(), change, rtol=1e-4, atol=1e-5)
    return count


@pytest.mark.parametrize("kind", LINEAR)
def test_lora(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR[kind])
    folder = adapter_on(bases[kind], tmp_path / "adapter", config, MAKERS[kind][1])
    adapter = check(bases[kind], folder, MAKERS[kind][1])
    assert check_factors(adapter) == len(adapter.touched)


@pytest.mark.parametrize("kind", EMBEDDING)
def test_embeddings_biases_and_dora(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    targets = [*LINEAR[kind], EMBEDDING[kind]]
    kinds: tuple[dict[str, Any], ...] = ({"bias": "lora_only"}, {"use_dora": True})
    for number, more in enumerate(kinds):
        config = LoraConfig(r=3, target_modules=targets, use_rslora=bool(number), **more)
        folder = adapter_on(bases[kind], tmp_path / str(number), config, MAKERS[kind][1])
        adapter = check(bases[kind], folder, MAKERS[kind][1])
        assert bool(check_factors(adapter)) == (not number)


@pytest.mark.parametrize("kind", FEEDFORWARD)
def test_ia3(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    targets, forward = FEEDFORWARD[kind]
    config = IA3Config(target_modules=targets, feedforward_modules=forward)
    folder = adapter_on(bases[kind], tmp_path / "adapter", config, MAKERS[kind][1])
    adapter = check(bases[kind], folder, MAKERS[kind][1])
    assert check_factors(adapter) == 0


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_of_ranks_and_alphas(rslora: bool, bases: dict[str, Path], tmp_path: Path) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=5,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={r"layers\.0\.self_attn.q_proj": 2, "proj": 9, "v_proj": 3},
        alpha_pattern={"model.layers.1.mlp.down_proj": 7, r"layers.\d+.self_attn.v_proj": 11},
        use_rslora=rslora,
    )
    folder = adapter_on(bases["llama"], tmp_path / "adapter", config, AutoModelForCausalLM)
    adapter = check(bases["llama"], folder, AutoModelForCausalLM)
    ranks = {name: own.rank for name in adapter.touched if (own := adapter.factors(name))}
    assert ranks["model.layers.0.self_attn.q_proj.weight"] == 2
    assert ranks["model.layers.1.self_attn.q_proj.weight"] == 4
    assert ranks["model.layers.0.self_attn.v_proj.weight"] == 3


def test_all_biases(bases: dict[str, Path], tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["query"], bias="all")
    folder = adapter_on(bases["bert"], tmp_path / "adapter", config)
    adapter = check(bases["bert"], folder, AutoModel)
    assert "encoder.layer.0.attention.output.LayerNorm.bias" in adapter.touched


@pytest.mark.parametrize("dora", [False, True])
def test_convolutions(dora: bool, bases: dict[str, Path], tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["projection", "q_proj"], use_dora=dora)
    folder = adapter_on(bases["vit"], tmp_path / "adapter", config)
    adapter = check(bases["vit"], folder, AutoModel)
    assert adapter.info("embeddings.patch_embeddings.projection.weight").shape[2:] == (4, 4)


def test_the_head_of_a_classifier_and_the_prefix_of_its_class(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    for kind, auto_class, targets in (
        ("bert", AutoModelForSequenceClassification, ["query", "dense"]),
        ("vit", AutoModelForImageClassification, ["q_proj", "fc1"]),
    ):
        config = LoraConfig(r=2, target_modules=targets, modules_to_save=["classifier"])
        base = bases[kind]
        folder = adapter_on(base, tmp_path / kind, config, auto_class)
        adapter, live = opened(base, folder), live_names(base)
        # The head is made at random when the model is loaded, so only the adapter's copy counts.
        merged = merged_by_peft(base, folder, auto_class)
        for name in adapter.touched:
            plain = live.get(name, name)
            own = merged[plain if plain in merged else f"{kind}.{plain}"]
            torch.testing.assert_close(adapter.tensor(name), own, rtol=2e-6, atol=2e-6)
        assert {"classifier.weight", "classifier.bias"} <= set(adapter.touched)
        assert "classifier.weight" not in adapter.base


def test_saved_embeddings_come_before_their_factors(bases: dict[str, Path], tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])
    base = bases["qwen2"]
    folder = adapter_on(base, tmp_path / "adapter", config, AutoModelForCausalLM)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert key in tensors
    save_file({**tensors, key: tensors[key] + 1}, file)
    check(base, folder, AutoModelForCausalLM)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_other_types_are_rounded_once(
    kind: str, dtype: torch.dtype, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(bases[kind], dtype=dtype).save_pretrained(base)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR[kind])
    folder = adapter_on(bases[kind], tmp_path / "adapter", config, AutoModelForCausalLM)
    checkpoint = Checkpoint.open(base)
    adapter = AdapterCheckpoint.read(folder, checkpoint)
    merged = merged_by_peft(base, folder, AutoModelForCausalLM, dtype)
    different = total = 0
    for name in adapter.touched:
        factors = adapter.factors(name) or pytest.fail(name)
        exact = checkpoint.tensor(name).double() + factors.product(torch.float64)
        ours = adapter.tensor(name)
        assert ours.dtype == dtype
        assert (ours.double() - exact).abs().le((merged[name].double() - exact).abs() + 1e-6).all()
        different, total = different + int((ours != merged[name]).sum()), total + ours.numel()
        assert factors.rank == 4
    assert different <= 0.001 * total
