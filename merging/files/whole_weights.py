"""A finetuned checkpoint as the delta of its whole task vector, without writing one.

It has what merge methods read of a delta that keeps every coordinate, so they give the same bytes.
"""

from torch import Tensor

from restitch.merging.digests import digest_json
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.sparse_layout import KeptInfo


class WholeWeights:
    """The weights of some tensors of a finetuned model.

    Args:
        finetuned: the finetuned checkpoint under the base's names.
        names: the localizable tensors, sorted.
    """

    kind = "delta"

    def __init__(self, finetuned: Checkpoint, names: tuple[str, ...]) -> None:
        self.path = finetuned.path
        self.metadata: dict[str, str] = {}
        self.names = names
        self._finetuned = finetuned
        self.total = sum(finetuned.info(name).numel for name in names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def info(self, name: str) -> KeptInfo:
        """Type, shape and number of weights of a tensor."""
        info = self._finetuned.info(name)
        return KeptInfo(name, info.dtype, info.shape, info.numel)

    def values(self, name: str) -> Tensor:
        """All weights of a tensor, flat; do not write to them."""
        return self._finetuned.tensor(name).reshape(-1)

    def apply(self, name: str, flat: Tensor) -> None:
        """Overwrite a flat tensor with the weights."""
        flat.copy_(self.values(name))

    def content_digest(self) -> str:
        """The digest of the choice of tensors: every coordinate of each is kept."""
        return digest_json([[name, self.info(name).kept] for name in self.names])
