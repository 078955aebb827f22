"""A LoRA adapter in the form of Hugging Face's PEFT: `adapter_config.json` and its weights.

The change of a layer's weight is B A. Every layer has its own rank, and alpha is the rank, so the
factors are stored as they are. A layer that keeps its weight as inputs x outputs (GPT-2's Conv1D)
stores the same B (outputs x rank) and A (rank x inputs), and the change is the transpose of B A.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from restitch.merging.numerics.factors import Factors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraLayer:
    """The change of one layer's weight.

    Attributes:
        factors: of the weight as it is stored, with the scale 1.
        transposed: whether the weight is stored as inputs x outputs.
    """

    factors: Factors
    transposed: bool = False


def write_lora(
    folder: Path, layers: Mapping[str, LoraLayer], dtype: torch.dtype, config: Mapping[str, Any]
) -> int:
    """Write an adapter, and return the number of its parameters.

    Args:
        folder: an existing folder.
        layers: by the name of the module in the loaded model; at least one.
        dtype: of the stored factors.
        config: more keys of `adapter_config.json`, such as `task_type`.
    """
    ranks = {name: layer.factors.rank for name, layer in sorted(layers.items())}
    highest = max(ranks.values())
    pattern = {name: rank for name, rank in ranks.items() if rank != highest}
    tensors: dict[str, Tensor] = {}
    for name, layer in sorted(layers.items()):
        left, right = layer.factors.left, layer.factors.right
        outputs, inputs = (right.mT, left.mT) if layer.transposed else (left, right)
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = inputs.to(dtype).contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = outputs.to(dtype).contiguous()
    values = {
        "peft_type": "LORA",
        "r": highest,
        "lora_alpha": highest,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": list(ranks),
        "fan_in_fan_out": any(layer.transposed for layer in layers.values()),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        **config,
    }
    text = json.dumps(values, indent=2, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())
