"""Texts and pairs of texts as input of encoders: how they are tokenized, and their length."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from restitch.merging.errors import BadInput
from restitch.modeling.configs import read_config
from restitch.modeling.data.rows import Example
from restitch.modeling.families.family import Batch, Preprocess
from restitch.modeling.pretrained_files import load_tokenizer

# What files of encoders and decoders may carry before all of their names.
PREFIXES = (
    "model.",
    "bert.",
    "roberta.",
    "distilbert.",
    "mpnet.",
    "electra.",
    "deberta.",
    "albert.",
    "transformer.",
)
# The transformer blocks in the layouts that encoders have, with or without a prefix.
_BLOCKS = (
    "encoder.layer.[0-9]*",
    "encoder.layers.[0-9]*",
    "encoder.block.[0-9]*",
    "encoder.albert_layer_groups.[0-9]*",
    "transformer.layer.[0-9]*",
    "layers.[0-9]*",
    "layer.[0-9]*",
    "blocks.[0-9]*",
    # Not `h.0.attn.bias`, which is a mask in old files of GPT-2.
    "h.[0-9]*.weight",
    "h.[0-9]*[!n].bias",
    "h.[0-9]*c_attn.bias",
)
# Tokens where nothing else limits them.
_WITHOUT_LIMIT = 512
BLOCKS = tuple(glob for block in _BLOCKS for glob in (block, f"*.{block}"))


def text_preprocessor(folder: Path, limit: int, tokenizer: Any = None) -> Preprocess:
    """Tokenize texts or sentence pairs, padded to the longest in the batch.

    Args:
        folder: with the tokenizer.
        limit: the most tokens of a text or a pair.
        tokenizer: the folder's, with other settings.
    """
    tokenizer = tokenizer or load_tokenizer(folder)

    def preprocess(examples: Sequence[Example]) -> Batch:
        columns = [list(column) for column in zip(*(e.inputs for e in examples), strict=True)]
        if len(columns) > 2:
            raise BadInput(
                "too many input columns under data: input",
                expected="one column, or two for sentence pairs",
                found=len(columns),
            )
        batch: Batch = dict(
            tokenizer(
                *columns, padding=True, truncation=True, max_length=limit, return_tensors="pt"
            )
        )
        labels = [one.label if one.number is None else one.number for one in examples]
        if all(label is not None for label in labels):
            batch["labels"] = torch.tensor(labels)
        return batch

    return preprocess


def padded_on_the_right(folder: Path) -> Any:
    """The tokenizer of a decoder, which pads on the right, if it must with the end of text."""
    tokenizer = load_tokenizer(folder)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def text_limit(folder: Path) -> int:
    """The smaller limit of tokenizer and position embeddings."""
    tokenizer = load_tokenizer(folder)
    return min(int(tokenizer.model_max_length), position_limit(folder))


def position_limit(folder: Path) -> int:
    """The number of tokens that the position embeddings allow.

    RoBERTa and related models count positions from after the padding index, so their tables have
    more rows than positions.
    """
    return _position_limit(folder, read_config(folder).to_json_string(use_diff=False))


@lru_cache(maxsize=64)
def _position_limit(folder: Path, _config: str) -> int:
    # Cached: it makes the whole model without weights, and every reader of rows needs it.
    from transformers import AutoModel

    config = read_config(folder)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - offset
    positions = int(getattr(config, "max_position_embeddings", 0) or 0)
    return positions if positions > 0 else _WITHOUT_LIMIT
