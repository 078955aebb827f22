"""The weights of a model that lie in a file, by the parameters of the model that stand for them."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from restitch.modeling.pretrained import NamedModel


class StoredWeights:
    """The weights of a model that was loaded without them.

    Args:
        model: a model that a family loaded with `empty`.
        parameters: its tensors by their names in the file.
        read: reads the weights of a name.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, Tensor], read: Callable[[str], Tensor]
    ) -> None:
        self._read = read
        self._names: dict[int, str] = {}
        for name, live in parameters.items():
            self._names.setdefault(id(live), name)
        named = [module for module in model.modules() if isinstance(module, NamedModel)]
        self._joined = {id(each.whole): each for module in named for each in module.joined}

    def __contains__(self, live: Tensor) -> bool:
        return id(live) in self._names or id(live) in self._joined

    def read(self, live: Tensor, device: torch.device) -> Tensor:
        """The weights of a parameter on a device, in its type; those of the file are not copied."""
        if id(live) in self._joined:
            return self._joined[id(live)].read(self._read, device)
        return self._read(self._names[id(live)]).to(device, live.dtype)
