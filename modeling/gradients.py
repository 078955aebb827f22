"""Precision and memory of backward passes.

On a GPU that has bfloat16, matrix products use it; weights, scores and reported numbers do not.
Elsewhere nothing is rounded. If the activations of a model do not fit, only the inputs of its
repeated layers are stored and the rest is computed again in the backward pass: the gradients are
the same, for one more forward pass.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def precision(device: torch.device) -> AbstractContextManager[object]:
    """Set the precision of matrix products on a device, within a block."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model: the items of its lists of one kind of module."""
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
    """Store no activations inside repeated layers, within a block."""
    layers = repeated_layers(model)
    # A block on another device has one that moves its inputs.
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        # It hides the method of the class until it is deleted.
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                del layer.forward
            else:
                layer.forward = own
