"""CLIP: image towers, scored against the zero-shot head of the base's own text tower.

Any CLIP of transformers works, with any activation. The PIL processor always prepares images, with
the folder's own settings, so that every worker sees the same pixels. A finetuned folder may hold
the vision tower alone: projection, text tower and logit scale are the base's. By default only the
blocks of the vision tower are localizable.
"""

from collections.abc import Sequence
from pathlib import Path

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
from restitch.modeling.data.rows import Example
from restitch.modeling.families.family import Batch, Family, Preprocess
from restitch.modeling.heads import Head, embed_prompts, scaled_cosines
from restitch.modeling.pretrained import (
    NamedModel,
    load_image_processor,
    load_pretrained,
    load_tokenizer,
)
from restitch.registry.specs.task import HeadSpec, Modality

# Keys that affect the text tower only, never the features of images.
_TOKEN_IDS = frozenset({"pad_token_id", "bos_token_id", "eos_token_id"})
# A tower's copy of the width; only models without a common configuration read it.
_UNREAD = frozenset({"projection_dim"})


class Clip(Family):
    """The family `clip`."""

    name = "clip"
    version = 1
    prefixes = ("vision_model.", "clip.", "model.")
    localizable: tuple[str, ...] = (
        "vision_model.encoder.layers.*",
        "*.vision_model.encoder.layers.*",
    )
    modality: Modality = "image"

    def config_differences(self, base: Path, finetuned: Path) -> list[str]:
        """The configuration keys that change the forward pass of the common towers."""
        ours, theirs = read_config(base), read_config(finetuned)
        if theirs.model_type == "clip_vision_model" and ours.model_type == "clip":
            return differences(
                ours.vision_config.to_dict(),
                theirs.to_dict(),
                ignore=_UNREAD,
                known=known_keys(ours.vision_config),
                prefix="vision_config",
            )
        if ours.model_type != "clip" or theirs.model_type != "clip":
            return model_type_difference(ours.model_type, theirs.model_type) or [
                f"model_type: {ours.model_type!r} is not 'clip'"
            ]
        keys = (
            []
            if ours.projection_dim == theirs.projection_dim
            else [f"projection_dim: base {ours.projection_dim}, finetuned {theirs.projection_dim}"]
        )
        for part in ("text_config", "vision_config"):
            keys += differences(
                getattr(ours, part).to_dict(),
                getattr(theirs, part).to_dict(),
                ignore=_TOKEN_IDS | _UNREAD,
                known=known_keys(getattr(ours, part)),
                prefix=part,
            )
        return keys

    def load(self, folder: Path) -> nn.Module:
        """Load the whole CLIP in a folder."""
        from transformers import CLIPModel

        kind = read_config(folder).model_type
        if kind != "clip":
            raise BadInput(
                f"{folder} is not a whole CLIP",
                expected="model_type 'clip'",
                found=repr(kind),
                hint="the base needs both towers; a finetuned model may be the vision tower alone",
            )
        return load_pretrained(folder, CLIPModel, prefixes=self.prefixes, required=self.localizable)

    def parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """The live tensors by their names in the folder's file."""
        return NamedModel.of(model).tensors()

    def max_length(self, folder: Path) -> int:
        """The smaller limit of tokenizer and text tower."""
        positions = int(read_config(folder).text_config.max_position_embeddings)
        return min(int(load_tokenizer(folder).model_max_length), positions)

    def preprocessor(self, folder: Path, max_length: int | None = None) -> Preprocess:
        """Resize, crop and normalize images with the settings of the folder's processor."""
        process = load_image_processor(folder)

        def preprocess(examples: Sequence[Example]) -> Batch:
            for example in examples:
                if len(example.inputs) != 1:
                    raise BadInput(
                        f"{example.where}: CLIP reads one image per row",
                        found=f"{len(example.inputs)} input columns",
                    )
            images = [example.inputs[0] for example in examples]
            # Stacked by numpy: the threads that prepare batches must not start torch's own threads.
            pixels = process(images, return_tensors="np")["pixel_values"]
            batch: Batch = {"pixel_values": torch.from_numpy(pixels)}
            if all(example.label is not None for example in examples):
                batch["labels"] = torch.tensor([example.label for example in examples])
            return batch

        return preprocess

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
        tokenizer = load_tokenizer(folder)
        clip = NamedModel.of(model).inner
        device = next(model.parameters()).device

        def embed(texts: list[str]) -> Tensor:
            tokens = tokenizer(
                texts,
                padding=True,
                truncation=True,
                max_length=spec.max_length,
                return_tensors="pt",
            ).to(device)
            output = clip.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            )
            features: Tensor = output.pooler_output
            return features

        return Head({"weight": embed_prompts(spec, embed, progress=progress)}, spec)

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """Normalized image embeddings, [batch, features]."""
        output = NamedModel.of(model).inner.get_image_features(pixel_values=batch["pixel_values"])
        return nn.functional.normalize(output.pooler_output, dim=-1)

    def logits(self, model: nn.Module, batch: Batch, head: Head) -> Tensor:
        """Scaled cosines with the class embeddings, [batch, classes]."""
        own = NamedModel.of(model).inner.logit_scale.exp()
        scale = own if head.spec.scale is None else head.spec.scale
        return scaled_cosines(self.features(model, batch), head.tensors["weight"], scale)
