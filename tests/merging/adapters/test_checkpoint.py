"""An adapter reads as a checkpoint: base + scaling * B A, rounded once; nothing more is read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from restitch.merging.adapters.checkpoint import AdapterCheckpoint
from restitch.merging.errors import BadInput, CannotJoin
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.shards import holds_adapter
from restitch.merging.ranking.task_vector import TaskVector, check_finite
from restitch.merging.ranking.top_k import strided_sample
from tests.merging.adapters.folders import PREFIX, write_adapter
from tests.tiny import base_tensors, save

Q, K = "layers.0.attn", "layers.1.attn"


def lora(module: str = Q, rank: int = 2, out: int = 8, inputs: int = 8) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(rank)
    return {
        f"{module}.lora_A.weight": torch.randn((rank, inputs), generator=random),
        f"{module}.lora_B.weight": torch.randn((out, rank), generator=random),
    }


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return save(tmp_path / "base", base_tensors())


def refused(folder: Path, base: Checkpoint, match: str) -> str:
    with pytest.raises(BadInput, match=match) as caught:
        AdapterCheckpoint.read(folder, base, where="org/adapter")
    assert "org/adapter" in caught.value.message()
    assert caught.value.hint
    return caught.value.message()


def test_only_touched_tensors_are_computed(tmp_path: Path, base: Checkpoint) -> None:
    read: list[str] = []
    watched = Checkpoint.from_files(base.path, base.files, fetch=read.append)
    folder = write_adapter(tmp_path / "adapter", lora(), lora_alpha=3)
    adapter = AdapterCheckpoint.read(folder, watched)
    assert adapter.names == base.names
    assert adapter.touched == (f"{Q}.weight",)
    assert adapter.nbytes == base.nbytes
    assert not read
    factors = lora()
    expected = base.tensor(f"{Q}.weight") + 1.5 * (
        factors[f"{Q}.lora_B.weight"] @ factors[f"{Q}.lora_A.weight"]
    )
    assert torch.equal(adapter.tensor(f"{Q}.weight"), expected)
    assert read == [f"{Q}.weight"]
    assert torch.equal(adapter.tensor(f"{K}.weight"), base.tensor(f"{K}.weight"))
    assert adapter.factors(f"{K}.weight") is None
    assert adapter.tensor_digest(f"{K}.weight") == base.tensor_digest(f"{K}.weight")
    assert bytes(adapter.tensor_bytes(f"{Q}.weight")) == expected.numpy().tobytes()
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_the_digest_covers_factors_configuration_and_base(tmp_path: Path, base: Checkpoint) -> None:
    def digest(name: str, tensors: dict[str, Tensor], on: Checkpoint = base, **config: Any) -> str:
        folder = write_adapter(tmp_path / name, tensors, **config)
        return AdapterCheckpoint.read(folder, on).digest()

    other = save(tmp_path / "other", base_tensors(seed=1))
    changed = {name: value + 1 for name, value in lora().items()}
    digests = [
        digest("a", lora()),
        digest("b", changed),
        digest("c", lora(), lora_alpha=4),
        digest("d", lora(), use_rslora=True),
        digest("e", lora(), other),
    ]
    assert len(set(digests)) == len(digests)
    same = digest("f", lora(), lora_dropout=0.5, target_modules=["attn"], peft_version="0.5")
    assert same == digests[0]


def test_threads_do_not_change_the_bytes(tmp_path: Path) -> None:
    base = save(tmp_path / "base", {"layers.0.q.weight": torch.randn(700, 300)})
    folder = write_adapter(tmp_path / "adapter", lora("layers.0.q", 16, 700, 300), r=16)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            adapter = AdapterCheckpoint.read(folder, base)
            found.append(bytes(adapter.tensor_bytes("layers.0.q.weight")))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_renamed_tensors_are_computed_too(tmp_path: Path, base: Checkpoint) -> None:
    adapter = AdapterCheckpoint.read(write_adapter(tmp_path / "adapter", lora()), base)
    renamed = adapter.renamed({f"{Q}.weight": "q", f"{K}.weight": "k"})
    assert renamed.names == ("k", "q")
    assert renamed.touched == ("q",)
    assert torch.equal(renamed.tensor("q"), adapter.tensor(f"{Q}.weight"))
    assert torch.equal(renamed.tensor("k"), base.tensor(f"{K}.weight"))
    assert renamed.factors("q") is not None


def test_a_task_vector_of_an_adapter_is_its_change(tmp_path: Path, base: Checkpoint) -> None:
    adapter = AdapterCheckpoint.read(write_adapter(tmp_path / "adapter", lora()), base)
    vector = TaskVector(base, adapter, [f"{Q}.weight", f"{K}.weight"])
    assert not vector.is_zero()
    assert not vector.difference(f"{K}.weight").any()
    check_finite(adapter, base)


@pytest.mark.parametrize(
    "prefix",
    [
        PREFIX,
        "",
        f"_fsdp_wrapped_module.{PREFIX}",
        f"module.{PREFIX}",
        f"{PREFIX}_orig_mod.",
        f"{PREFIX}model.",
        f"{PREFIX}bert.",
    ],
)
def test_prefixes_of_wrappers_and_of_other_classes(
    prefix: str, tmp_path: Path, base: Checkpoint
) -> None:
    tensors = lora() | lora(K) | {"head.weight": torch.ones(3, 8)}
    adapter = AdapterCheckpoint.read(write_adapter(tmp_path / "a", tensors, prefix=prefix), base)
    assert {f"{Q}.weight", f"{K}.weight"} <= set(adapter.touched)
    (head,) = set(adapter.names) - set(base.names)
    assert head.endswith("head.weight")


def test_a_prefix_of_the_base(tmp_path: Path) -> None:
    tensors = {f"model.{name}": value for name, value in base_tensors().items()}
    base = save(tmp_path / "base", tensors)
    adapter = AdapterCheckpoint.read(write_adapter(tmp_path / "adapter", lora()), base)
    assert adapter.touched == (f"model.{Q}.weight",)


def test_modules_that_match_in_two_ways_are_refused(tmp_path: Path) -> None:
    tensors = {f"{tower}.{Q}.weight": torch.ones(8, 8) for tower in ("text", "vision")}
    base = save(tmp_path / "base", tensors)
    message = refused(write_adapter(tmp_path / "adapter", lora()), base, "more than one way")
    assert f"{Q}.weight as text.{Q}.weight" in message


@pytest.mark.parametrize("named", ["default", "mine"])
def test_names_of_adapters_in_tensor_names(named: str, tmp_path: Path, base: Checkpoint) -> None:
    plain = AdapterCheckpoint.read(write_adapter(tmp_path / "plain", lora()), base)
    tensors = {name.replace(".weight", f".{named}.weight"): v for name, v in lora().items()}
    tensors |= {
        f"{K}.original_module.weight": torch.zeros(8, 8),
        f"{K}.modules_to_save.default.weight": torch.ones(8, 8),
        f"{Q}.base_layer.bias": torch.ones(8),
    }
    adapter = AdapterCheckpoint.read(write_adapter(tmp_path / "adapter", tensors), base)
    assert torch.equal(adapter.tensor(f"{Q}.weight"), plain.tensor(f"{Q}.weight"))
    assert torch.equal(adapter.tensor(f"{K}.weight"), torch.ones(8, 8))
    assert f"{Q}.bias" in adapter.touched


@settings(max_examples=40)
@given(
    out=st.integers(1, 9),
    inputs=st.integers(1, 9),
    rank=st.integers(1, 4),
    alpha=st.floats(-8, 8, width=32),
    rslora=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    stored=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_any_lora_is_the_base_and_its_product(
    tmp_path_factory: pytest.TempPathFactory,
    out: int,
    inputs: int,
    rank: int,
    alpha: float,
    rslora: bool,
    dtype: torch.dtype,
    stored: torch.dtype,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("lora")
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn((out, inputs), generator=random).to(dtype)
    base = save(folder / "base", {"layers.0.q.weight": weight})
    factors = {
        "layers.0.q.lora_A.weight": torch.randn((rank, inputs), generator=random).to(stored),
        "layers.0.q.lora_B.weight": torch.randn((out, rank), generator=random).to(stored),
    }
    config: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "use_rslora": rslora}
    adapter = AdapterCheckpoint.read(write_adapter(folder / "a", factors, **config), base)
    a, b = (each.double() for each in factors.values())
    scaling = alpha / rank**0.5 if rslora else alpha / rank
    exact = weight.double() + scaling * (b @ a)
    found = adapter.tensor("layers.0.q.weight")
    assert (found.dtype, found.shape) == (dtype, weight.shape)
    step = torch.finfo(dtype).eps
    assert torch.allclose(found.double(), exact, rtol=step, atol=1e-12 if step < 1e-12 else 2e-5)
    own = adapter.factors("layers.0.q.weight") or pytest.fail("no factors")
    assert torch.allclose(own.product(), (scaling * (b @ a)).float(), rtol=1e-4, atol=1e-4)


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "rank 0": ({"r": 0}, "r in the adapter_config.json"),
    "a rank that is no number": ({"r": "8"}, "r in the adapter_config.json"),
    "a pattern with rank 0": ({"rank_pattern": {"attn": 0}}, "rank_pattern of attn"),
    "no scaling": ({"lora_alpha": None}, "lora_alpha in the"),
    "a scaling that is a text": ({"lora_alpha": "16"}, "lora_alpha in the"),
    "a scaling of NaN": ({"lora_alpha": float("nan")}, "lora_alpha in the"),
    "an infinite scaling": ({"alpha_pattern": {"attn": float("inf")}}, "alpha_pattern of attn"),
    "a huge scaling": ({"lora_alpha": 10**400}, "lora_alpha in the"),
    "patterns in a list": ({"alpha_pattern": ["attn"]}, "alpha_pattern in the"),
    "a broken pattern": ({"rank_pattern": {"(attn": 2}}, "rank_pattern in the"),
    "a slow pattern": ({"rank_pattern": {"(a+)+b": 2}}, "rank_pattern in the"),
    "a slow choice": ({"rank_pattern": {"a?a?a?a?aaaa": 2}}, "rank_pattern in the"),
    "another rank": ({"r": 3}, "does not fit its configuration"),
    "magnitudes without DoRA": ({"use_dora": True}, "does not fit its configuration"),
    "a flag that is a text": ({"use_dora": "no"}, "use_dora in the"),
    "another kind": ({"peft_type": "LOHA"}, "of a kind that is not supported"),
    "no kind": ({"peft_type": None}, "of a kind that is not supported"),
    "(IA)^3": ({"peft_type": "IA3"}, "does not fit its configuration"),
    "a bias in the factors": ({"lora_bias": True}, "options that are not supported"),
    "tokens": ({"alora_invocation_tokens": [1]}, "options that are not supported"),
    "replicated layers": ({"layer_replication": [[0, 1]]}, "options that are not supported"),
    "parameters": ({"target_parameters": ["w"]}, "options that are not supported"),
    "megatron": ({"megatron_config": {"a": 1}}, "options that are not supported"),
    "trained tokens": ({"trainable_token_indices": [3]}, "options that are not supported"),
    "pooled inputs": ({"use_qalora": True}, "options that are not supported"),
    "another start": ({"init_lora_weights": "pissa"}, "options that are not supported"),
    "an option of the future": ({"use_new_math": {"x": 1}}, "options that are not supported"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_configurations_that_cannot_be_computed_are_refused(
    case: str, tmp_path: Path, base: Checkpoint
) -> None:
    config, match = BAD_CONFIGS[case]
    message = refused(write_adapter(tmp_path / "adapter", lora(), **config), base, match)
    key = next(iter(config)).removesuffix("_pattern")
    assert key in message or "peft_type" in message or "rank" in message or "use_dora" in message


def test_options_without_effect_are_allowed(tmp_path: Path, base: Checkpoint) -> None:
    config: dict[str, Any] = {
        "bias": "none",
        "exclude_modules": ["lm_head"],
        "init_lora_weights": "gaussian",
        "layers_to_transform": [0],
        "loftq_config": {"bits": 4},
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
        "use_qalora": False,
        "option_of_the_future": None,
        "another_one": [],
    }
    write_adapter(tmp_path / "adapter", lora(), **config)
    assert AdapterCheckpoint.read(tmp_path / "adapter", base).touched


BAD_TENSORS: dict[str, tuple[dict[str, Tensor], str, str]] = {
    "no B": ({f"{Q}.lora_A.weight": torch.ones(2, 8)}, "does not fit", "lora_B missing"),
    "no A": ({f"{Q}.lora_B.weight": torch.ones(8, 2)}, "does not fit", "lora_A missing"),
    "rank 0": (
        {f"{Q}.lora_A.weight": torch.ones(0, 8), f"{Q}.lora_B.weight": torch.ones(8, 0)},
        "does not fit",
        "lora_A [0, 8]",
    ),
    "another base": (lora(inputs=9), "does not fit", "lora_A [2, 9]"),
    "a vector": (lora("layers.0.norm"), "does not fit", "the base's [8]"),
    "no such module": (lora("layers.7.attn"), "no weights for modules", "layers.7.attn"),
    "one of two modules": (lora() | lora("layers.7.mlp"), "no weights", "layers.7.mlp"),
    "two kinds": (
        lora() | {f"{Q}.lora_embedding_A": torch.ones(2, 8)},
        "does not fit",
        "lora_embedding_B missing",
    ),
    "another library": (
        lora() | {f"{K}.hada_w1_a": torch.ones(2, 2)},
        "factors that are not supported",
        "hada_w1_a",
    ),
    "a bias of B": (lora() | {f"{Q}.lora_B.bias": torch.ones(8)}, "not supported", "lora_B.bias"),
    "magnitudes": (
        lora() | {f"{Q}.lora_magnitude_vector": torch.ones(8)},
        "does not fit",
        "has lora_magnitude_vector, with use_dora: false",
    ),
    "no factors": ({"head.weight": torch.ones(2, 2)}, "no factors", "head.weight"),
    "integers": (
        {name: value.to(torch.int8) for name, value in lora().items()},
        "a type that is not supported",
        "I8",
    ),
    "an adapter on an adapter": (
        {f"{PREFIX}{name}": value for name, value in lora().items()},
        "an adapter on an adapter",
        PREFIX,
    ),
    "factors of factors": (
        {f"{Q}.lora_A.lora_A.weight": torch.ones(2, 8)},
        "factors that are not supported",
        "lora_A.lora_A",
    ),
    "several adapters": (
        {f"{Q}.lora_A.one.weight": torch.ones(2, 8), f"{Q}.lora_B.two.weight": torch.ones(8, 2)},
        "several adapters",
        "one, two",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_factors_that_do_not_fit_are_refused_by_name(
    case: str, tmp_path: Path, base: Checkpoint
) -> None:
    tensors, match, named = BAD_TENSORS[case]
    assert named in refused(write_adapter(tmp_path / "adapter", tensors), base, match)


def test_a_vector_of_ia3_must_fit(tmp_path: Path, base: Checkpoint) -> None:
    folder = write_adapter(tmp_path / "a", {f"{Q}.ia3_l": torch.ones(1, 9)}, peft_type="IA3")
    assert "a vector [1, 9]" in refused(folder, base, "does not fit")


def test_files_that_are_missing_or_broken(tmp_path: Path, base: Checkpoint) -> None:
    folder = write_adapter(tmp_path / "adapter", lora())
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    for text in ("", "[]", "{", '{"peft_type": ["LORA"]}', "[" * 100_000):
        config.write_text(text)
        refused(folder, base, "is not valid|of a kind")
    config.unlink()
    refused(folder, base, "has no adapter_config")
    config.write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    weights.write_bytes(b"\x00" * 20)
    with pytest.raises(BadInput):
        AdapterCheckpoint.read(folder, base)
    weights.rename(folder / "adapter_model.bin")
    message = refused(folder, base, "without adapter_model.safetensors")
    assert "PeftModel.from_pretrained" in message
    (folder / "adapter_model.bin").unlink()
    refused(folder, base, "without adapter_model.safetensors")


def test_factors_that_are_not_finite_are_seen_in_the_weights(
    tmp_path: Path, base: Checkpoint
) -> None:
    tensors = lora()
    tensors[f"{Q}.lora_B.weight"][3, 1] = float("nan")
    adapter = AdapterCheckpoint.read(write_adapter(tmp_path / "adapter", tensors), base)
    assert adapter.tensor(f"{Q}.weight").isnan().sum() == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_of_scores_is_computed_from_the_factors_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    base = save(tmp_path / "base", base_tensors(dtype=dtype))
    adapter = AdapterCheckpoint.read(write_adapter(tmp_path / "adapter", lora()), base)
    vector = TaskVector(base, adapter, [f"{Q}.weight"])
    scores = torch.cat([chunk.clone() for chunk in vector.chunks(f"{Q}.weight")])
    monkeypatch.delattr(AdapterCheckpoint, "tensor")
    sample = vector.sample(f"{Q}.weight", 16, 3)
    expected = strided_sample(scores, 16, 3)
    assert sample.dtype == expected.dtype
    assert torch.allclose(sample, expected, rtol=0.05)


def test_finite_factors_show_that_weights_are_finite(
    tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = AdapterCheckpoint.read(write_adapter(tmp_path / "adapter", lora()), base)
    monkeypatch.delattr(AdapterCheckpoint, "tensor")
    check_finite(adapter, base)


@pytest.mark.parametrize("large", [1e3, 4e4])
def test_weights_that_overflow_are_found(tmp_path: Path, large: float) -> None:
    base = save(tmp_path / "base", base_tensors(dtype=torch.float16))
    tensors = lora()
    tensors[f"{Q}.lora_A.weight"].fill_(large)
    tensors[f"{Q}.lora_B.weight"].fill_(1.0)
    adapter = AdapterCheckpoint.read(write_adapter(tmp_path / "adapter", tensors), base)
    if large < 1e4:
        check_finite(adapter, base)
    else:
        with pytest.raises(CannotJoin, match="not finite") as caught:
            check_finite(adapter, base)
        assert f"{Q}.weight: 64 of 64" in caught.value.message()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"], True),
        (["adapter_config.json", "adapter_model.bin"], True),
        (["adapter_model.safetensors"], True),
        (["adapter_config.json", "adapter_model.safetensors", "model.safetensors"], False),
        (["config.json", "model.safetensors"], False),
        ([], False),
    ],
)
def test_folders_that_hold_an_adapter(names: list[str], expected: bool) -> None:
    assert holds_adapter(names) == expected
