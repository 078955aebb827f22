"""Tensors that are no plain weights: quantized values, and factors of adapters.

Only float16, bfloat16, float32 and float64 can be compared and merged. A checkpoint with quantized
matrices or with adapter factors next to frozen weights would otherwise be read without them.
"""

import re

import torch

from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import FLOATING, Checkpoint, TensorInfo
from restitch.merging.files.header import DTYPE_NAMES
from restitch.merging.files.shards import MERGE_ADAPTER

_NARROW = (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32)
# Parts that models use as positions, masks and counters.
_BUFFER = re.compile(r".*(mask|ids|idx|index|indices|bias|num_batches_tracked).*")
_FACTOR = re.compile(
    r"lora_.*|ia3_l|hada_[wt]\d.*|lokr_.*|oft_.*|boft_.*|vera_lambda_.*|"
    r"base_layer|original_module|modules_to_save"
)


def check_plain(checkpoint: Checkpoint, where: str) -> None:
    """Refuse a checkpoint with tensors that are no plain weights.

    Args:
        checkpoint: whole or finetuned weights.
        where: their name in messages.

    Raises:
        BadInput: it holds quantized tensors or factors of an adapter; names them.
    """
    factors = [name for name in checkpoint.names if any(map(is_factor, name.split(".")))]
    if factors:
        raise BadInput(
            f"{where} holds factors of an adapter next to frozen weights",
            expected="whole weights that contain the adapter's change, or the adapter_config.json"
            " of the training next to these, which says how the factors are scaled",
            found=f"{len(factors)} of {len(checkpoint.names)} tensors belong to an adapter",
            details=factors,
            hint=MERGE_ADAPTER,
        )
    quantized = [info for info in map(checkpoint.info, checkpoint.names) if is_quantized(info)]
    if quantized:
        raise BadInput(
            f"{where} holds quantized tensors",
            expected="weights in float32, bfloat16, float16 or float64",
            found=f"{len(quantized)} of {len(checkpoint.names)} tensors are quantized",
            details=[described(info) for info in quantized],
            hint="use the model before quantization, or dequantize it and save it again",
        )


def is_factor(component: str) -> bool:
    """True if a component of a tensor's name is that of an adapter's factor, or of its layer."""
    return _FACTOR.fullmatch(component) is not None


def is_quantized(info: TensorInfo) -> bool:
    """True if a tensor holds floats of 8 bits, or a matrix of packed or narrow integers."""
    if info.dtype in FLOATING:
        return False
    if info.dtype.is_floating_point:
        return True
    matrix = len(info.shape) > 1 or "weight" in _last(info.name)
    return info.dtype in _NARROW and matrix and not is_buffer(info)


def is_buffer(info: TensorInfo) -> bool:
    """True if a tensor holds positions, masks or counters, which finetuning does not change."""
    if info.dtype in (torch.int64, torch.bool):
        return True
    name = _last(info.name)
    return name == "inv_freq" or (
        info.dtype not in FLOATING and _BUFFER.fullmatch(name.lower()) is not None
    )


def described(info: TensorInfo) -> str:
    """The name, type and shape of a tensor, for messages."""
    return f"{info.name}: {DTYPE_NAMES[info.dtype]} {list(info.shape)}"


def _last(name: str) -> str:
    return name.rpartition(".")[2]
