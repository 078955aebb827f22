"""Images as input of models: resized, cropped and normalized by the folder's own processor."""

from collections.abc import Sequence
from pathlib import Path

import torch

from restitch.merging.errors import BadInput
from restitch.modeling.data.rows import Example
from restitch.modeling.families.family import Batch, Preprocess
from restitch.modeling.pretrained_files import load_image_processor


def image_preprocessor(folder: Path, family: str) -> Preprocess:
    """Prepare images with the settings of the folder's processor.

    Args:
        folder: with the processor.
        family: its name in messages.
    """
    process = load_image_processor(folder)

    def preprocess(examples: Sequence[Example]) -> Batch:
        for example in examples:
            if len(example.inputs) != 1:
                raise BadInput(
                    f"{example.where}: the family {family} reads one image per row",
                    found=f"{len(example.inputs)} input columns",
                )
        images = [example.inputs[0] for example in examples]
        # Stacked by numpy: the threads that prepare batches must not start torch's own threads.
        arrays = process(images, return_tensors="np")
        batch: Batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if all(example.label is not None for example in examples):
            batch["labels"] = torch.tensor([example.label for example in examples])
        return batch

    return preprocess
