"""A short pass on this machine: the seconds that a model of a kind needs for a row.

Only the configuration is read: the model has random weights, and two of its layers. The seconds of
two layers are scaled to all of them, so that a model of any size is timed in a second or two.
"""

import io
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from restitch.registry.specs.data import Modality

_LAYERS = 2
_SECONDS = 1.0
_ROWS = 16
# What a row is in a short pass.
TOKENS = 128
PHOTO = (500, 375)


@dataclass(frozen=True)
class ShortPass:
    """What a short pass measured.

    Attributes:
        row: the seconds of one row.
        rows: how many rows were timed.
        what: a row, in words.
        parameters: of the part of the model that reads the rows.
        squared_inputs: the sum over its linear layers of the square of their inputs.
        squared_outputs: the same of their outputs.
    """

    row: float
    rows: int
    what: str
    parameters: int
    squared_inputs: int
    squared_outputs: int


def short_pass(folder: Path, modality: Modality, device: torch.device) -> ShortPass:
    """Time a model on a device.

    Args:
        folder: has the model's configuration.
        modality: what it reads.
        device: runs it.
    """
    from transformers import AutoConfig, AutoModel

    config: Any = AutoConfig.from_pretrained(folder)
    config = getattr(config, "vision_config", config) if modality == "image" else config
    with torch.device("meta"):
        whole = AutoModel.from_config(config)
    linear = [module for module in whole.modules() if isinstance(module, nn.Linear)]
    short, layers = _with_layers(config, _LAYERS)
    model = AutoModel.from_config(short).eval().to(device)
    inputs = _inputs(config, modality, device)
    rows, seconds = _timed(lambda: model(**inputs), device)
    row = seconds / (rows * _ROWS) * layers / min(_LAYERS, layers)
    what = f"a text of {TOKENS} tokens"
    if modality == "image":
        photos, decoding = _timed(_read_photo(config.image_size), device)
        row += decoding / photos
        what = f"a photo of {PHOTO[0]} x {PHOTO[1]} pixels, which is read and resized first"
    return ShortPass(
        row,
        rows * _ROWS,
        what,
        sum(tensor.numel() for tensor in whole.parameters()),
        sum(layer.in_features**2 for layer in linear),
        sum(layer.out_features**2 for layer in linear),
    )


def _with_layers(config: Any, count: int) -> tuple[Any, int]:
    """The configuration with fewer layers, and how many it has."""
    layers = int(config.num_hidden_layers)
    short = deepcopy(config)
    short.num_hidden_layers = min(count, layers)
    if getattr(short, "num_decoder_layers", None):
        short.num_decoder_layers = short.num_hidden_layers
    if getattr(short, "layer_types", None):
        short.layer_types = short.layer_types[: short.num_hidden_layers]
    return short, layers


def _inputs(config: Any, modality: Modality, device: torch.device) -> dict[str, torch.Tensor]:
    if modality == "image":
        shape = (_ROWS, 3, config.image_size, config.image_size)
        return {"pixel_values": torch.zeros(shape, device=device)}
    most = getattr(config, "max_position_embeddings", None) or TOKENS
    tokens = torch.ones((_ROWS, min(TOKENS, int(most) // 2)), dtype=torch.long, device=device)
    inputs = {"input_ids": tokens}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens[:, :4]
    return inputs


def _read_photo(size: int) -> Callable[[], object]:
    noise = np.random.RandomState(0).randint(0, 256, (*PHOTO[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG")

    def read() -> object:
        with Image.open(io.BytesIO(file.getvalue())) as image:
            return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), np.float32)

    return read


def _timed(once: Callable[[], object], device: torch.device) -> tuple[int, float]:
    """Run something again and again for a second, and once before; return count and seconds."""
    with torch.inference_mode():
        once()
        _finish(device)
        count, started = 0, time.perf_counter()
        while count == 0 or time.perf_counter() - started < _SECONDS:
            once()
            _finish(device)
            count += 1
        return count, time.perf_counter() - started


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
