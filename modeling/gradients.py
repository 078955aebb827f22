"""How a model's backward passes are taken: in which precision, and with how much memory.

On a GPU matrix products are in bfloat16, where it has that; weights, scores and everything that is
reported stay as they are. Elsewhere nothing is rounded. A model whose activations do not fit keeps
only what goes into each of its repeated layers, and computes the rest again for the backward pass:
the same gradients, one forward pass more.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def precision(device: torch.device) -> AbstractContextManager[object]:
    """What products are computed in on a device, for the length of a block."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that a model has many of: the elements of its lists of one kind of module."""
    found = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            layers = list(module)
            if len({type(layer) for layer in layers}) == 1:
                found += layers
    inner = {id(each) for layer in found for each in layer.modules() if each is not layer}
    return [layer for layer in found if id(layer) not in inner]


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Within the block the activations inside of repeated layers are not kept."""
    layers = repeated_layers(model)
    for layer in layers:
        # An attribute of the instance, which the class's own method is behind again afterwards.
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
