"""Edits: how a merged model differs from its base, tensor by tensor.

An `Edits` knows which tensors it touches and overwrites weights in a flat copy of such a
tensor, in the base's type. It may compute them on the way: nothing of the size of the
model needs to exist. `edited` gives one whole tensor.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor

from restitch.merging.files.checkpoint import Checkpoint


@runtime_checkable
class Edits(Protocol):
    """What export, patches and evaluation need of a merged model: just this."""

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that may differ from the base, sorted by their UTF-8 bytes."""

    def apply(self, name: str, flat: Tensor) -> None:
        """Overwrite weights of tensor `name` in place.

        Args:
            name: one of `names`.
            flat: a flat, contiguous copy of the base's tensor, of the base's type; edits of whole
                task vectors take a wider one too, and then round to that.
        """


@runtime_checkable
class StreamedEdits(Edits, Protocol):
    """Edits that can also be applied part by part, so that no whole tensor is needed."""

    def editor(self, name: str) -> Callable[[Tensor], None]:
        """A function that edits the parts of tensor `name`, given one after the other.

        It is used in the thread that asked for it, before that thread asks for another.

        Args:
            name: one of `names`. The parts are flat, of any size, and together the tensor.
        """


class NoEdits:
    """The edits of a merged model without members: the base itself."""

    names: tuple[str, ...] = ()

    def apply(self, name: str, flat: Tensor) -> None:
        """Nothing to overwrite."""


def edited(base: Checkpoint, edits: Edits, name: str) -> Tensor:
    """A new tensor of the base's shape and type with the edits of `name` applied."""
    tensor = base.tensor(name).clone()
    if name in edits.names:
        edits.apply(name, tensor.view(-1))
    return tensor
