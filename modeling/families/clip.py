"""CLIP, SigLIP and SigLIP 2: image towers, scored by the zero-shot head of the base's text tower.

Any of these of transformers works, with any activation, at a fixed resolution or with a variable
one (NaFlex, whose images become patches with a mask). The PIL processor always prepares images,
with the folder's own settings, so that every worker sees the same pixels. A finetuned folder may
hold the vision tower alone: projection, text tower, logit scale and bias are the base's. By default
only the blocks of the vision tower are localizable, not the attention pooling of SigLIP.

SigLIP reads the last token of a text, so its texts are padded to the length of the model. Its
scores are the scaled cosines plus the logit bias. One bias for all classes changes neither their
order nor the cross-entropy of the scores, which is the loss for SigLIP, too.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restitch.merging.errors import BadInput
from restitch.merging.progress import Progress
from restitch.modeling.configs import (
    differences,
    known_keys,
    model_type_difference,
    read_config,
)
from restitch.modeling.families.family import Batch, Family, Preprocess
from restitch.modeling.heads import Head, embed_prompts, scaled_cosines
from restitch.modeling.image_inputs import image_preprocessor
from restitch.modeling.kinds import Kind
from restitch.modeling.pretrained import NamedModel, load_pretrained
from restitch.modeling.pretrained_files import load_tokenizer
from restitch.registry.specs.data import Modality
from restitch.registry.specs.head import HeadSpec

# Keys that affect the text tower only, never the features of images.
_TOKEN_IDS = frozenset({"pad_token_id", "bos_token_id", "eos_token_id"})
# A tower's copy of the width; only models without a common configuration read it.
_UNREAD = frozenset({"projection_dim"})
# Inputs of text towers. A tokenizer of SigLIP gives no mask: its models were trained without.
_READ_BY_TEXT_TOWER = ("input_ids", "attention_mask")
# The model types of whole models, each with that of its vision tower alone.
_TOWERS = {
    "clip": "clip_vision_model",
    "siglip": "siglip_vision_model",
    "siglip2": "siglip2_vision_model",
}


class Clip(Family):
    """The family `clip`."""

    name = "clip"
    summary = "the nearest label prompt of an image"
    version = 1
    prefixes = ("vision_model.", "clip.", "model.")
    localizable: tuple[str, ...] = (
        "vision_model.encoder.layers.*",
        "*.vision_model.encoder.layers.*",
    )
    modality: Modality = "image"
    kinds = (Kind.IMAGE_TEXT,)
    model_types = tuple(_TOWERS)
    parts = (Kind.IMAGE,)

    def config_differences(self, base: Path, finetuned: Path) -> list[str]:
        """The configuration keys that change the forward pass of the common towers."""
        ours, theirs = read_config(base), read_config(finetuned)
        if theirs.model_type == _TOWERS.get(ours.model_type):
            return differences(
                ours.vision_config.to_dict(),
                theirs.to_dict(),
                ignore=_UNREAD,
                known=known_keys(ours.vision_config),
                prefix="vision_config",
            )
        if other := model_type_difference(ours.model_type, theirs.model_type):
            return other
        keys = []
        one, two = (getattr(config, "projection_dim", None) for config in (ours, theirs))
        if one != two:
            keys.append(f"projection_dim: base {one}, finetuned {two}")
        if not getattr(ours.vision_config, "vision_use_head", True):
            keys.append("vision_config.vision_use_head: the base has no attention pooling")
        for part in ("text_config", "vision_config"):
            keys += differences(
                getattr(ours, part).to_dict(),
                getattr(theirs, part).to_dict(),
                ignore=_TOKEN_IDS | _UNREAD,
                known=known_keys(getattr(ours, part)),
                prefix=part,
            )
        return keys

    def load(
        self, folder: Path, dtype: torch.dtype = torch.float32, *, empty: bool = False
    ) -> nn.Module:
        """Load the whole model in a folder."""
        from transformers import AutoModel

        kind = read_config(folder).model_type
        if kind not in _TOWERS:
            raise BadInput(
                f"{folder} is not a whole CLIP or SigLIP",
                expected=f"model_type {', '.join(_TOWERS)}",
                found=repr(kind),
                hint="the base needs both towers; a finetuned model may be the vision tower alone",
            )
        return load_pretrained(
            folder,
            AutoModel,
            prefixes=self.prefixes,
            required=self.localizable,
            dtype=dtype,
            empty=empty,
        )

    def parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """The live tensors by their names in the folder's file."""
        return NamedModel.of(model).tensors()

    def max_length(self, folder: Path) -> int:
        """The smaller limit of tokenizer and text tower."""
        positions = int(read_config(folder).text_config.max_position_embeddings)
        return min(int(load_tokenizer(folder).model_max_length), positions)

    def preprocessor(self, folder: Path, max_length: int | None = None) -> Preprocess:
        """Resize, crop and normalize images with the settings of the folder's processor."""
        return image_preprocessor(folder, self.name)

    def resolve(self, folder: Path, spec: HeadSpec) -> HeadSpec:
        """Fill in the length; no scale means the model's own."""
        return spec.model_copy(update={"max_length": spec.max_length or self.max_length(folder)})

    def build_head(
        self,
        model: nn.Module,
        folder: Path,
        spec: HeadSpec,
        *,
        finetuned: Path | None = None,
        progress: Progress | None = None,
    ) -> Head:
        """The zero-shot head: mean text embeddings of the prompts, normalized before and after."""
        spec = self.resolve(folder, spec)
        tokenize = _tokenizer(folder, spec.max_length, self._padded_length(model, folder))
        clip = NamedModel.of(model).inner
        device = next(model.parameters()).device

        def embed(texts: list[str]) -> Tensor:
            tokens = {name: tensor.to(device) for name, tensor in tokenize(texts).items()}
            output = clip.get_text_features(**tokens)
            features: Tensor = output.pooler_output
            return features

        return Head({"weight": embed_prompts(spec, embed, progress=progress)}, spec)

    def _padded_length(self, model: nn.Module, folder: Path) -> int | None:
        """The length of every text for SigLIP; None pads to the longest text."""
        return self.max_length(folder) if _is_siglip(NamedModel.of(model).inner) else None

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """Normalized image embeddings, [batch, features], in float32."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        output = NamedModel.of(model).inner.get_image_features(**inputs)
        return nn.functional.normalize(output.pooler_output.float(), dim=-1)

    def logits(self, model: nn.Module, batch: Batch, head: Head) -> Tensor:
        """Scaled cosines with the class embeddings, plus SigLIP's bias, [batch, classes]."""
        inner = NamedModel.of(model).inner
        scale = inner.logit_scale.float().exp() if head.spec.scale is None else head.spec.scale
        scores = scaled_cosines(self.features(model, batch), head.tensors["weight"], scale)
        return scores + inner.logit_bias if _is_siglip(inner) else scores


def _is_siglip(model: Any) -> bool:
    return hasattr(model, "logit_bias")


def _tokenizer(
    folder: Path, most: int | None, length: int | None
) -> Callable[[list[str]], dict[str, Tensor]]:
    """A function from texts to the tokens that a text tower reads.

    Args:
        folder: with the tokenizer.
        most: texts are cut to this many tokens.
        length: texts are padded to this many tokens; None pads to the longest.
    """
    tokenizer = load_tokenizer(folder)

    def tokenize(texts: list[str]) -> dict[str, Tensor]:
        tokens = tokenizer(texts, truncation=True, max_length=most)
        padded = tokenizer.pad(
            tokens,
            padding=True if length is None else "max_length",
            max_length=length,
            return_tensors="pt",
        )
        return {name: padded[name] for name in _READ_BY_TEXT_TOWER if name in padded}

    return tokenize
