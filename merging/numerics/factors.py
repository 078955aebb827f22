"""Low-rank matrices, and their factors in 8 bits.

A task vector of a matrix is kept as two factors: `scale * left @ right`. In 8 bits, each column of
`left` and each row of `right` is whole multiples of a step of its own, in bfloat16.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

STEP_DTYPE = torch.bfloat16
_MOST = 127


@dataclass(frozen=True)
class Factors:
    """The matrix `scale * left @ right`.

    Attributes:
        left: rows x rank.
        right: rank x columns.
        scale: a finite number.
    """

    left: Tensor
    right: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        fits = self.left.dim() == self.right.dim() == 2
        if not fits or self.left.shape[1] != self.right.shape[0]:
            shapes = f"{tuple(self.left.shape)} and {tuple(self.right.shape)}"
            raise ValueError(f"factors of the shapes {shapes} have no product")

    @property
    def rank(self) -> int:
        """The number of columns of the left factor, which is an upper bound of the rank."""
        return self.left.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The type that holds both factors exactly."""
        return torch.promote_types(self.left.dtype, self.right.dtype)

    def product(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix. Its last bits depend on the machine and on the threads."""
        product = self.left.to(dtype) @ self.right.to(dtype)
        return product if self.scale == 1.0 else product.mul_(self.scale)

    def at(self, positions: Tensor) -> Tensor:
        """The numbers at some flat positions in float32, equal to `product` up to rounding."""
        columns = self.right.shape[1]
        left = self.left[positions // columns].float()
        right = self.right[:, positions % columns].float()
        return (left * right.mT).sum(1).mul_(self.scale)

    def bound(self) -> float:
        """A number that no magnitude exceeds; infinite or NaN if a factor has such numbers."""
        left, right = self.left.double().square().sum(1), self.right.double().square().sum(0)
        if not left.numel() or not right.numel():
            return 0.0
        return abs(self.scale) * float((left.max() * right.max()).sqrt())


def in_8_bits(columns: Tensor) -> tuple[Tensor, Tensor]:
    """The codes (int8) and the steps (bfloat16, one per column) of a finite float32 matrix."""
    steps = (columns.abs().amax(0) / _MOST).to(STEP_DTYPE)
    sizes = steps.float()
    codes = torch.where(sizes > 0, columns / sizes.clamp_min(torch.finfo().tiny), 0.0)
    return codes.round_().clamp_(-_MOST, _MOST).to(torch.int8), steps


def from_8_bits(codes: Tensor, steps: Tensor) -> Tensor:
    """The float32 matrix of some codes and the steps of its columns."""
    return codes.float() * steps.float()


def above_rounding(values: Tensor, side: int) -> Tensor:
    """True for the singular values that are not 0 up to rounding.

    Args:
        values: those of each matrix along the last dimension.
        side: the longer side of the matrices.
    """
    return values > values.amax(-1, keepdim=True) * side * torch.finfo(values.dtype).eps
