"""Text encoders: mean-pooled, normalized embeddings, scored against embeddings of the labels.

Any text encoder of transformers works, saved alone, with a head (`BertForMaskedLM`), or as the
encoder of an encoder-decoder architecture (`T5EncoderModel`). The features of a text are the mean
of the last hidden states over its attention mask, L2-normalized. The score of a class is the scale
times the cosine with the base's features of its label prompts. By default only the transformer
blocks are localizable.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from restitch.merging.errors import BadInput
from restitch.merging.progress import Progress
from restitch.modeling.configs import config_differences
from restitch.modeling.data.rows import Example
from restitch.modeling.families.family import Batch, Family, Preprocess
from restitch.modeling.heads import Head, embed_prompts, scaled_cosines
from restitch.modeling.kinds import Kind, model_kind
from restitch.modeling.pretrained import NamedModel, load_pretrained
from restitch.modeling.text_inputs import BLOCKS, PREFIXES, text_limit, text_preprocessor
from restitch.registry.specs.data import Modality
from restitch.registry.specs.head import HeadSpec

DEFAULT_SCALE = 20.0


class TextEncoder(Family):
    """The family `text-encoder`."""

    name = "text-encoder"
    summary = "the nearest label prompt, by mean-pooled embeddings"
    version = 1
    prefixes = PREFIXES
    localizable = BLOCKS
    modality: Modality = "text"
    kinds = (Kind.TEXT_ENCODER,)

    def config_differences(self, base: Path, finetuned: Path) -> list[str]:
        """The configuration keys that change the forward pass."""
        return config_differences(base, finetuned)

    def load(
        self, folder: Path, dtype: torch.dtype = torch.float32, *, empty: bool = False
    ) -> nn.Module:
        """Load the encoder in a folder."""
        from transformers import AutoModel, AutoModelForTextEncoding

        model = model_kind(folder)
        if model.kind is Kind.SEQ2SEQ_LM:
            raise BadInput(f"{folder} is a model with a decoder", expected="an encoder alone")
        auto_class = AutoModelForTextEncoding if model.encoder_half else AutoModel
        return load_pretrained(
            folder,
            auto_class,
            prefixes=self.prefixes,
            required=self.localizable,
            dtype=dtype,
            empty=empty,
        )

    def parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """The live tensors by their names in the folder's file."""
        return NamedModel.of(model).tensors()

    def max_length(self, folder: Path) -> int:
        """The smaller limit of tokenizer and position embeddings."""
        return text_limit(folder)

    def preprocessor(self, folder: Path, max_length: int | None = None) -> Preprocess:
        """Tokenize texts or sentence pairs, padded to the longest in the batch."""
        return text_preprocessor(folder, max_length or self.max_length(folder))

    def resolve(self, folder: Path, spec: HeadSpec) -> HeadSpec:
        """Fill in scale and length."""
        return spec.model_copy(
            update={
                "scale": DEFAULT_SCALE if spec.scale is None else spec.scale,
                "max_length": spec.max_length or self.max_length(folder),
            }
        )

    def build_head(
        self,
        model: nn.Module,
        folder: Path,
        spec: HeadSpec,
        *,
        finetuned: Path | None = None,
        progress: Progress | None = None,
    ) -> Head:
        """The embeddings of the label prompts."""
        spec = self.resolve(folder, spec)
        preprocess = self.preprocessor(folder, spec.max_length)
        device = next(model.parameters()).device

        def embed(texts: list[str]) -> Tensor:
            batch = preprocess([Example((text,), None, "label prompt") for text in texts])
            return self.features(model, {name: t.to(device) for name, t in batch.items()})

        return Head({"weight": embed_prompts(spec, embed, progress=progress)}, spec)

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """Normalized embeddings, [batch, features], in float32."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        hidden = NamedModel.of(model).inner(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return nn.functional.normalize(pooled, dim=-1)

    def logits(self, model: nn.Module, batch: Batch, head: Head) -> Tensor:
        """Scaled cosines with the label embeddings, [batch, classes]."""
        scale = DEFAULT_SCALE if head.spec.scale is None else head.spec.scale
        return scaled_cosines(self.features(model, batch), head.tensors["weight"], scale)
