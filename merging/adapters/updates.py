"""How an adapter changes one tensor: in float32, on the base's values.

Each update is made from the parts of one module and checks that they fit the base's tensor. The
result has the type of the values that it is given; the caller rounds it once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from restitch.merging.adapters.names import EMBEDDING_A, EMBEDDING_B, MAGNITUDE, A, B
from restitch.merging.numerics.factors import Factors

# Reads a part of a module.
Read = Callable[[], Tensor]


class Update(Protocol):
    """A change of one tensor."""

    def apply(self, before: Tensor) -> Tensor:
        """The changed values, in a tensor of their own.

        Args:
            before: the base's values in float32 or float64; not written to.
        """

    def factors(self) -> Factors | None:
        """The change as a product; None if it has another form."""


@dataclass(frozen=True)
class LowRank:
    """LoRA: base + scaling * B A; with magnitudes DoRA, which also scales each output.

    Attributes:
        a: [rank, in], or a kernel of a convolution.
        b: [out, rank].
        scaling: of the product.
        turned: the tensor is [in, out], as those of embeddings and of GPT-2's layers are.
        magnitude: the norm of each output's weights.
    """

    a: Read
    b: Read
    scaling: float
    turned: bool = False
    magnitude: Read | None = None

    def apply(self, before: Tensor) -> Tensor:
        """Base + scaling * B A, times magnitude over norm."""
        after = self._product().product(before.dtype).view(before.shape).add_(before)
        if self.magnitude is not None:
            output = 1 if self.turned else 0
            inputs = [at for at in range(after.ndim) if at != output]
            norm = torch.linalg.vector_norm(after, dim=inputs, keepdim=True)
            after.mul_(self.magnitude().to(after.dtype).view(norm.shape) / norm)
        return after.contiguous()

    def factors(self) -> Factors | None:
        """The factors in their own type; a convolution's tensor counts as [out, rest]."""
        return self._product() if self.magnitude is None else None

    def _product(self) -> Factors:
        a, b = (values.reshape(values.shape[0], -1) for values in (self.a(), self.b()))
        if self.turned:
            return Factors(a.mT.contiguous(), b.mT.contiguous(), self.scaling)
        return Factors(b, a, self.scaling)


@dataclass(frozen=True)
class Scale:
    """(IA)^3: base times a vector.

    Attributes:
        vector: the factors.
        shape: of the vector, to be broadcast over the tensor.
    """

    vector: Read
    shape: tuple[int, ...]

    def apply(self, before: Tensor) -> Tensor:
        """Base times the vector."""
        return before * self.vector().to(before.dtype).view(self.shape)

    def factors(self) -> Factors | None:
        """None: the change is not a product of its own."""
        return None


@dataclass(frozen=True)
class Part:
    """A part of a module: its shape, and how to read it."""

    shape: tuple[int, ...]
    read: Read


def low_rank(
    parts: Mapping[str, Part], shape: tuple[int, ...], rank: int, scaling: float, turned: bool
) -> "LowRank | str":
    """The update by the factors of a module, or what is wrong with them.

    Args:
        parts: of the module, by name.
        shape: of the base's tensor.
        rank: by the configuration.
        scaling: of the product.
        turned: a square matrix is [in, out].
    """
    embedding = EMBEDDING_A in parts or EMBEDDING_B in parts
    first, second = (EMBEDDING_A, EMBEDDING_B) if embedding else (A, B)
    missing = [name for name in (first, second) if name not in parts]
    if missing:
        return f"{' and '.join(missing)} missing"
    extra = sorted(parts.keys() - {first, second, MAGNITUDE})
    if extra:
        return f"factors of two kinds: {first} and {extra[0]}"
    a, b = parts[first], parts[second]
    if embedding and len(shape) != 2:
        return f"factors of an embedding for a tensor of shape {list(shape)}"
    turned = embedding or (len(shape) == 2 and _is_turned(a, b, shape, turned))
    out, inputs = (shape[1], (shape[0],)) if turned else (shape[0], shape[1:])
    wide = (1,) * (len(shape) - 2)
    expected = (rank, *inputs), (out, rank, *wide)
    if len(shape) < 2 or (a.shape, b.shape) != expected:
        return (
            f"{first} {list(a.shape)} and {second} {list(b.shape)} do not fit rank {rank} and"
            f" the base's {list(shape)}"
        )
    magnitude = parts.get(MAGNITUDE)
    if magnitude is not None and prod(magnitude.shape) != out:
        return f"{MAGNITUDE} {list(magnitude.shape)} does not fit the base's {list(shape)}"
    return LowRank(a.read, b.read, scaling, turned, None if magnitude is None else magnitude.read)


def scale(vector: Part, shape: tuple[int, ...], turned: bool) -> "Scale | str":
    """The update of a matrix by a vector of (IA)^3, or what is wrong with it.

    Args:
        vector: [out, 1], or [1, in] in a feedforward module.
        shape: of the base's matrix.
        turned: the matrix is [in, out].
    """
    if len(shape) != 2 or len(vector.shape) != 2:
        return f"a vector {list(vector.shape)} for a tensor of shape {list(shape)}"
    out, inputs = shape[::-1] if turned else shape
    if vector.shape not in ((out, 1), (1, inputs)):
        return f"a vector {list(vector.shape)} does not fit the base's {list(shape)}"
    return Scale(vector.read, vector.shape[::-1] if turned else vector.shape)


def _is_turned(a: Part, b: Part, shape: tuple[int, ...], square: bool) -> bool:
    """True if a matrix is [in, out] by the shapes of its factors, or as square ones are."""
    if not a.shape or not b.shape or a.shape[-1] == b.shape[0]:
        return square
    return (a.shape[-1], b.shape[0]) == shape
