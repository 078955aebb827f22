"""Set the weights of a loaded model by the names of its checkpoint.

Values are copied into the live tensors and converted to their dtype; nothing is ever added, so
setting and restoring leaves no trace.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.edits import Edits, edited
from restitch.modeling.joined_tensors import PieceLayer
from restitch.modeling.pretrained import NamedModel


def set_weights(parameters: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy tensors into the live ones of the same name.

    Args:
        parameters: live tensors by name, from `Family.parameters`.
        tensors: names with values of the same shapes, read one at a time.

    Raises:
        KeyError: the model does not have a name.
        ValueError: a shape differs.
    """
    with torch.no_grad():
        for name, value in tensors:
            live = parameters[name]
            if live.shape != value.shape:
                raise ValueError(f"{name} has shape {tuple(live.shape)}, not {tuple(value.shape)}")
            live.copy_(value)


def apply_edits(parameters: Mapping[str, Tensor], base: Checkpoint, edits: Edits) -> None:
    """Set the edited tensors to the values that an export would write.

    Edits are applied in the base's own dtype and converted afterwards, so that the evaluated
    weights are the stored ones.
    """
    set_weights(parameters, ((name, edited(base, edits, name)) for name in edits.names))


def restore(parameters: Mapping[str, Tensor], base: Checkpoint, names: Iterable[str]) -> None:
    """Set tensors back to the base's values."""
    set_weights(parameters, ((name, base.tensor(name)) for name in names))


@contextmanager
def resized(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Give live tensors the values and shapes of others within a block.

    A vocabulary with more tokens has more rows; layers read their size from the tensor itself.
    """
    own = {name: parameters[name].data for name in tensors}
    try:
        for name, value in tensors.items():
            parameters[name].data = value.to(own[name].device, own[name].dtype, copy=True)
        yield
    finally:
        for name, data in own.items():
            parameters[name].data = data


def linear_layers(
    model: nn.Module, parameters: Mapping[str, Tensor]
) -> dict[str, nn.Linear | PieceLayer]:
    """The linear layers of a loaded model by the names of their weights, sorted.

    The matrices of experts that the model holds joined are layers, too.
    """
    layers = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Linear)}
    found: dict[str, nn.Linear | PieceLayer] = {
        name: layers[id(live)] for name, live in parameters.items() if id(live) in layers
    }
    for module in model.modules():
        for joined in module.joined if isinstance(module, NamedModel) else ():
            found |= joined.layers()
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class WeightLayer:
    """A layer whose weight is a matrix.

    Attributes:
        module: its name in the model that transformers loads.
        transposed: whether the weight is stored as inputs x outputs, as in GPT-2.
    """

    module: str
    transposed: bool


def weight_layers(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, WeightLayer]:
    """The layers that a LoRA adapter can change, by the names of their weights, sorted."""
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D

    # Families put a model into a module of their own.
    loaded = next((each for each in model.modules() if isinstance(each, PreTrainedModel)), model)
    layers = {
        id(module.weight): WeightLayer(name, isinstance(module, Conv1D))
        for name, module in loaded.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    return {
        name: layers[id(live)] for name, live in sorted(parameters.items()) if id(live) in layers
    }
