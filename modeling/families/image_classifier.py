"""Image classifiers: finetuned image models, each with a head of its own.

Any model works that `AutoModelForImageClassification` loads and that has no BatchNorm: ViT, DeiT,
Swin, DINOv2, ConvNeXt, BEiT, ... BatchNorm keeps running statistics of the weights it was trained
with, which are wrong after merging, so such a base is refused. The PIL processor always prepares
images, with the base's own settings. By default only the blocks are localizable.
"""

from pathlib import Path

from restitch.modeling.classifier import Classifier
from restitch.modeling.families.family import Preprocess
from restitch.modeling.image_inputs import image_preprocessor
from restitch.modeling.kinds import Kind
from restitch.modeling.task_heads import ClassifierHeads
from restitch.registry.specs.data import Modality
from restitch.registry.specs.head import HeadSpec

_BLOCKS = (
    "encoder.layer.[0-9]*",
    "encoder.layers.[0-9]*",
    "encoder.stages.[0-9]*",
    "encoder.blocks.[0-9]*",
    "layers.[0-9]*",
    "layer.[0-9]*",
    "blocks.[0-9]*",
)


class ImageClassifier(Classifier):
    """The family `image-classifier`."""

    name = "image-classifier"
    summary = "the class of the task's own classification head"
    version = 1
    prefixes = ("vit.", "deit.", "swin.", "dinov2.", "convnext.", "beit.")
    localizable = tuple(glob for block in _BLOCKS for glob in (block, f"*.{block}"))
    task_heads = ClassifierHeads(
        "AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING"
    )
    # Keys for pretraining, and for a pooler that no classifier has.
    unread = frozenset({"encoder_stride", "pooler_act", "pooler_output_size", "use_mask_token"})
    modality: Modality = "image"
    kinds = (Kind.IMAGE,)

    def max_length(self, folder: Path) -> int | None:
        """None: there are no tokens."""
        return None

    def preprocessor(self, folder: Path, max_length: int | None = None) -> Preprocess:
        """Resize, crop and normalize images with the settings of the folder's processor."""
        return image_preprocessor(folder, self.name)

    def resolve(self, folder: Path, spec: HeadSpec) -> HeadSpec:
        """Nothing is left to fill in."""
        return spec
