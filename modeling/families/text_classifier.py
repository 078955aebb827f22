"""Text classifiers: finetuned encoders, each with a head of its own for texts or pairs of texts.

Any encoder works that `AutoModelForSequenceClassification` loads: BERT, RoBERTa, DistilBERT,
DeBERTa, MPNet, ModernBERT, ... The base is the pretrained encoder, with any head or none. A head
with one output gives a number, as for the similarity of two texts. By default only the transformer
blocks are localizable.

A decoder is taken as well, if the line names this family: GPT-2, Llama, ... Its head reads the last
token of the text. One without a token for padding is padded with its end of text, on the right.
"""

from pathlib import Path

import torch
from torch import nn

from restitch.modeling.classifier import Classifier
from restitch.modeling.families.family import Preprocess
from restitch.modeling.kinds import Kind, model_kind
from restitch.modeling.pretrained import NamedModel
from restitch.modeling.task_heads import ClassifierHeads
from restitch.modeling.text_inputs import (
    BLOCKS,
    PREFIXES,
    padded_on_the_right,
    text_limit,
    text_preprocessor,
)
from restitch.registry.specs.data import Modality
from restitch.registry.specs.head import HeadSpec
from restitch.registry.specs.metric import MetricName


class TextClassifier(Classifier):
    """The family `text-classifier`."""

    name = "text-classifier"
    summary = "the class of the task's own classification head"
    version = 1
    prefixes = PREFIXES
    localizable = BLOCKS
    task_heads = ClassifierHeads(
        "AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"
    )
    modality: Modality = "text"
    kinds = (Kind.TEXT_ENCODER,)
    also = (Kind.CAUSAL_LM,)
    metrics: tuple[MetricName, ...] = ("accuracy", "f1", "squared_error")

    def load(
        self, folder: Path, dtype: torch.dtype = torch.float32, *, empty: bool = False
    ) -> nn.Module:
        """Load the classification class; a decoder finds the last token before the padding."""
        loaded = super().load(folder, dtype, empty=empty)
        if model_kind(folder).kind is Kind.CAUSAL_LM:
            padding = padded_on_the_right(folder).pad_token_id
            NamedModel.of(loaded).inner.config.pad_token_id = padding
        return loaded

    def max_length(self, folder: Path) -> int:
        """The smaller limit of tokenizer and position embeddings."""
        return text_limit(folder)

    def preprocessor(self, folder: Path, max_length: int | None = None) -> Preprocess:
        """Tokenize texts or sentence pairs, padded to the longest in the batch."""
        limit = max_length or self.max_length(folder)
        if model_kind(folder).kind is not Kind.CAUSAL_LM:
            return text_preprocessor(folder, limit)
        return text_preprocessor(folder, limit, padded_on_the_right(folder))

    def resolve(self, folder: Path, spec: HeadSpec) -> HeadSpec:
        """Fill in the length."""
        return spec.model_copy(update={"max_length": spec.max_length or self.max_length(folder)})
