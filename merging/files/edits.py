"""Edits: the differences of a merged model from its base, tensor by tensor.

An `Edits` names the tensors that it changes and overwrites weights in a flat copy of such
a tensor, in the base's type. It may compute the weights on demand, so nothing of the size
of the model needs to exist. `edited` returns one whole tensor.
"""

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.order import by_bytes


@runtime_checkable
class Edits(Protocol):
    """All that export, patches and evaluation need of a merged model."""

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that may differ from the base, sorted by their UTF-8 bytes."""

    def apply(self, name: str, flat: Tensor) -> None:
        """Overwrite weights of tensor `name` in place.

        Args:
            name: one of `names`.
            flat: a flat, contiguous copy of the base's tensor, in the base's type or a wider one;
                the edits round to its type.
        """


@runtime_checkable
class StreamedEdits(Edits, Protocol):
    """Edits that can also be applied part by part, without a whole tensor in memory."""

    def editor(self, name: str) -> Callable[[Tensor], None]:
        """A function that edits the parts of tensor `name` in order.

        It is used only in the thread that asked for it, before that thread asks for another.

        Args:
            name: one of `names`. The parts are flat, of any size, and together the tensor.
        """


class RenamedEdits:
    """The same edits of a base under other names, for `Checkpoint.renamed`.

    Args:
        edits: of the base.
        mapping: names of the base to new ones; it has all that are edited.
    """

    def __init__(self, edits: Edits, mapping: Mapping[str, str]) -> None:
        self._edits = edits
        self._own = {mapping[name]: name for name in edits.names}
        self.names = tuple(sorted(self._own, key=by_bytes))

    def apply(self, name: str, flat: Tensor) -> None:
        """Overwrite weights as the edits do under the base's name."""
        self._edits.apply(self._own[name], flat)


def edited(base: Checkpoint, edits: Edits, name: str) -> Tensor:
    """A new tensor of the base's shape and type with the edits of `name` applied."""
    tensor = base.tensor(name).clone()
    if name in edits.names:
        edits.apply(name, tensor.view(-1))
    return tensor
