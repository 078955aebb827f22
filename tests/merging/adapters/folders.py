"""Folders of adapters, written without PEFT."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

PREFIX = "base_model.model."


def write_adapter(
    folder: Path, tensors: Mapping[str, Tensor], *, prefix: str = PREFIX, **config: Any
) -> Path:
    """Write an adapter; without a kind it is one of LoRA with rank 2 and a scaling of 1.

    Args:
        folder: the folder to write.
        tensors: by name, without the prefix.
        prefix: put before all names.
        config: keys of its configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = {prefix + name: value.contiguous() for name, value in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
    of_lora = {} if config.get("peft_type") == "IA3" else {"r": 2, "lora_alpha": 2}
    values = {"peft_type": "LORA", **of_lora, **config}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder
