"""Quantized tensors and adapter factors are refused; buffers and plain weights are not."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from restitch.merging.errors import BadInput
from restitch.merging.files.plain_weights import check_plain
from tests import tiny

LAYER = "encoder.layer.0.attention.self.query"
PLAIN = {
    f"{LAYER}.weight": torch.zeros(4, 4),
    f"{LAYER}.bias": torch.zeros(4, dtype=torch.float64),
    "h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
    "h.0.attn.masked_bias": torch.zeros((), dtype=torch.float16),
    "embeddings.position_ids": torch.arange(5).view(1, 5),
    "text.embeddings.position_ids": torch.arange(5, dtype=torch.int32).view(1, 5),
    "layers.0.attn.relative_position_index": torch.zeros(4, 4, dtype=torch.int32),
    "bn.num_batches_tracked": torch.zeros((), dtype=torch.int64),
    "empty.weight": torch.zeros(0, 4, dtype=torch.bfloat16),
    "layer_scale.scale": torch.zeros(4),
}
BYTES = torch.zeros(4, 4, dtype=torch.uint8)
QUANTIZED = {
    "fp8": {f"{LAYER}.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)},
    "fp8 with scales": {
        f"{LAYER}.weight": torch.zeros(4, 4).to(torch.float8_e5m2),
        f"{LAYER}.weight_scale_inv": torch.ones(1, 1),
    },
    "bitsandbytes int8": {f"{LAYER}.weight": BYTES.to(torch.int8), f"{LAYER}.SCB": torch.ones(4)},
    "bitsandbytes nf4": {
        f"{LAYER}.weight": torch.zeros(8, 1, dtype=torch.uint8),
        f"{LAYER}.weight.absmax": torch.ones(1),
        f"{LAYER}.weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8),
    },
    "gptq": {
        f"{LAYER}.qweight": torch.zeros(1, 4, dtype=torch.int32),
        f"{LAYER}.qzeros": torch.zeros(1, 1, dtype=torch.int32),
        f"{LAYER}.scales": torch.ones(1, 4).half(),
        f"{LAYER}.g_idx": torch.zeros(4, dtype=torch.int32),
    },
    "compressed-tensors": {f"{LAYER}.weight_packed": torch.zeros(4, 1, dtype=torch.int32)},
    "hqq": {f"{LAYER}.W_q": BYTES},
    "quanto": {f"{LAYER}.weight._data": BYTES.to(torch.int8)},
    "mxfp4": {"mlp.experts.gate_up_proj_blocks": torch.zeros(2, 4, 1, dtype=torch.uint8)},
}


def refused(folder: Path, tensors: dict[str, Tensor]) -> str:
    with pytest.raises(BadInput) as caught:
        check_plain(tiny.save(folder, tensors), "the model")
    return caught.value.message()


def test_weights_and_buffers_are_plain(tmp_path: Path) -> None:
    check_plain(tiny.save(tmp_path, PLAIN), "the model")


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_tensors_are_refused_and_named(tmp_path: Path, kind: str) -> None:
    rest = {name: value for name, value in PLAIN.items() if name not in QUANTIZED[kind]}
    message = refused(tmp_path, {**rest, **QUANTIZED[kind]})
    assert "the model holds quantized tensors" in message
    assert next(iter(QUANTIZED[kind])) in message


@pytest.mark.parametrize(
    "name",
    [
        f"base_model.model.{LAYER}.lora_A.default.weight",
        f"{LAYER}.lora_B.weight",
        f"{LAYER}.lora_magnitude_vector",
        f"{LAYER}.base_layer.weight",
        f"{LAYER}.ia3_l",
        f"{LAYER}.hada_w1_a",
        f"{LAYER}.lokr_w1",
        f"{LAYER}.vera_lambda_b",
        "classifier.modules_to_save.default.weight",
        "classifier.original_module.weight",
    ],
)
def test_factors_of_adapters_are_refused_and_named(tmp_path: Path, name: str) -> None:
    message = refused(tmp_path, {**PLAIN, name: torch.zeros(2, 2)})
    assert "factors of an adapter next to frozen weights" in message
    assert name in message
    assert f"1 of {len(PLAIN) + 1} tensors" in message


def test_the_list_of_tensors_is_cut_after_five(tmp_path: Path) -> None:
    tensors = {f"layers.{at}.qweight": torch.zeros(2, 2, dtype=torch.int32) for at in range(12)}
    lines = refused(tmp_path, tensors).splitlines()
    assert len([line for line in lines if "qweight" in line]) == 5
    assert "  - and 7 more" in lines
