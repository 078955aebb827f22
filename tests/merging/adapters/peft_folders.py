"""Adapters that PEFT makes on tiny models, with random factors, and what PEFT merges them into.

folder = adapter_on(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj"]))
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModel


def adapter_on(
    base: Path, folder: Path, config: PeftConfig, auto_class: Any = AutoModel, *, seed: int = 0
) -> Path:
    """Save an adapter on a model with noise on all that it trains.

    Args:
        base: the folder of the model.
        folder: the folder to write.
        config: of the adapter.
        auto_class: the class of transformers that loads the model.
        seed: of the noise.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(auto_class.from_pretrained(base), config)
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, value in sorted(model.named_parameters()):
                if value.requires_grad:
                    value.add_(0.3 * torch.randn(value.shape, generator=random))
        model.save_pretrained(str(folder))
    return folder


def merged_by_peft(
    base: Path, folder: Path, auto_class: Any = AutoModel, dtype: torch.dtype = torch.float32
) -> Mapping[str, Tensor]:
    """The tensors of the merged model, by its own names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = auto_class.from_pretrained(base, dtype=dtype)
        merged = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return dict(merged.state_dict())
