"""Text classifiers: finetuned encoders, each with a head of its own for texts or pairs of texts.

Any encoder works that `AutoModelForSequenceClassification` loads: BERT, RoBERTa, DistilBERT,
DeBERTa, MPNet, ModernBERT, ... The base is the pretrained encoder, with any head or none. A head
with one output gives a number, as for the similarity of two texts. By default only the transformer
blocks are localizable.
"""

from pathlib import Path

from restitch.modeling.classifier import Classifier
from restitch.modeling.families.family import Preprocess
from restitch.modeling.kinds import Kind
from restitch.modeling.task_heads import ClassifierHeads
from restitch.modeling.text_inputs import BLOCKS, PREFIXES, text_limit, text_preprocessor
from restitch.registry.specs.metric import MetricName
from restitch.registry.specs.task import HeadSpec, Modality


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
    metrics: tuple[MetricName, ...] = ("accuracy", "f1", "squared_error")

    def max_length(self, folder: Path) -> int:
        """The smaller limit of tokenizer and position embeddings."""
        return text_limit(folder)

    def preprocessor(self, folder: Path, max_length: int | None = None) -> Preprocess:
        """Tokenize texts or sentence pairs, padded to the longest in the batch."""
        return text_preprocessor(folder, max_length or self.max_length(folder))

    def resolve(self, folder: Path, spec: HeadSpec) -> HeadSpec:
        """Fill in the length."""
        return spec.model_copy(update={"max_length": spec.max_length or self.max_length(folder)})
