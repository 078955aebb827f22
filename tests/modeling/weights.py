"""Load a whole checkpoint into a live model."""

from collections.abc import Mapping

from torch import Tensor

from restitch.merging.files.checkpoint import Checkpoint
from restitch.modeling.weights import set_weights


def load_checkpoint(parameters: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    """Copy all floating tensors that the checkpoint and the model share.

    A checkpoint of a part, such as a vision tower, changes only that part.
    """
    shared = (name for name in checkpoint.names if name in parameters)
    set_weights(
        parameters,
        ((n, checkpoint.tensor(n)) for n in shared if checkpoint.info(n).dtype.is_floating_point),
    )
