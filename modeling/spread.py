"""Spread the blocks of a model that is larger than one GPU over several.

The repeated layers go to the devices in their order; all else lies on the first device. A hook of
accelerate brings the inputs of a block to its device and the outputs back, so code between
the blocks needs to know nothing of it, and gradients flow back the same way.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from restitch.modeling.gradients import repeated_layers
from restitch.modeling.stored_weights import StoredWeights


@dataclass(frozen=True)
class Room:
    """A device, and the bytes that weights and all that is held for them may take there."""

    device: torch.device
    size: int


def plan(model: nn.Module, rooms: Sequence[Room], share: float) -> list[int] | None:
    """The room of each block of a model, in their order.

    Args:
        model: a model, which may have no weights yet.
        rooms: the first one also holds what lies outside of the blocks.
        share: the bytes that are held in all for each byte of a weight.

    Returns:
        The places of the rooms; None if the model does not fit, or has no blocks.
    """
    blocks = repeated_layers(model)
    inside = {id(one) for block in blocks for one in block.parameters()}
    left = [room.size for room in rooms]
    left[0] -= sum(one.nbytes for one in model.parameters() if id(one) not in inside)
    if not blocks or left[0] < 0:
        return None
    places, at = [], 0
    for block in blocks:
        size = int(share * sum(one.nbytes for one in block.parameters()))
        while at < len(left) and left[at] < size:
            at += 1
        if at == len(left):
            return None
        left[at] -= size
        places.append(at)
    return places


def spread(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    rooms: Sequence[Room],
    places: Sequence[int],
) -> None:
    """Give a model without weights its weights on several devices.

    Args:
        model: a model that a family loaded with `empty`; it is changed in place.
        parameters: its tensors by their names, which stand for the weights.
        read: reads the weights of a name.
        rooms: the devices.
        places: the room of each block, as planned.
    """
    stored = StoredWeights(model, parameters, read)
    blocks = repeated_layers(model)
    where = {
        id(module): rooms[place].device
        for block, place in zip(blocks, places, strict=True)
        for module in block.modules()
    }
    placed: dict[int, nn.Parameter] = {}
    for module in model.modules():
        device = where.get(id(module), rooms[0].device)
        for own, weight in module._parameters.items():
            if weight is None:
                continue
            if id(weight) not in placed:
                value = stored.read(weight, device) if weight in stored else weight
                whole = value.to(device, weight.dtype, copy=True)
                placed[id(weight)] = nn.Parameter(whole, requires_grad=False)
            module._parameters[own] = placed[id(weight)]
        for own, buffer in module._buffers.items():
            module._buffers[own] = None if buffer is None else buffer.to(device)
    for block, place in zip(blocks, places, strict=True):
        if place:
            _bring_to(block, rooms[place].device)


def _bring_to(block: nn.Module, device: torch.device) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    # A cache keeps the keys and values of a block on its device.
    hook: Any = AlignDevicesHook(device, io_same_device=True, skip_keys=["past_key_values"])
    add_hook_to_module(block, hook)
