"""Merge methods that look at each weight matrix as a whole: singular vectors, or a small problem.

A rule is given the members' task vectors of one matrix and returns the merged one; tensors of
other shapes get the mean, unless the method says otherwise. Computed in float32, rounded once;
where the merged task vector is 0 the base's bits stay. Decompositions and optimizer steps differ
in their last bits between machines: such a method is `numeric`, and may compute where that is
fast (`computing_on`). One matrix of each member is in memory at a time.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.numerics.bitwise import as_integers
from restitch.merging.numerics.rounding import cast, round_once
from restitch.merging.order import by_bytes
from restitch.merging.rules.elementwise import kept_vectors
from restitch.merging.rules.stitch import DeltaMember


@dataclass(frozen=True)
class Matrix:
    """The task vectors of one tensor.

    Attributes:
        name: the tensor.
        changes: one behind the other: members x rows x columns, float32, on the device to
            compute on.
        members: the numbers of the members that have the tensor, in the order of their tasks.
    """

    name: str
    changes: Tensor
    members: tuple[int, ...]


Rule = Callable[[Matrix], Tensor]

_device: ContextVar[torch.device | None] = ContextVar("device", default=None)


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """What methods make of matrices, if they are called in this block, is computed there."""
    before = _device.set(device)
    try:
        yield
    finally:
        _device.reset(before)


class PerMatrix:
    """The edits of a rule.

    Args:
        base: the base's checkpoint.
        members: the members, each with its whole task vector.
        rule: what the task vectors of a matrix give together.
        otherwise: what those of a tensor that is no matrix give; by default their mean.
    """

    def __init__(
        self,
        base: Checkpoint,
        members: Iterable[DeltaMember],
        rule: Rule,
        otherwise: Rule | None = None,
    ) -> None:
        self._vectors = kept_vectors(base, members)
        self._rule = rule
        self._otherwise = otherwise or self._mean
        self._device = _device.get() or torch.device("cpu")
        self.names = tuple(sorted({n for v in self._vectors for n in v.names}, key=by_bytes))

    def apply(self, name: str, flat: Tensor) -> None:
        """Overwrite weights in a flat copy of the base's tensor."""
        there = tuple(i for i, vector in enumerate(self._vectors) if name in vector)
        changes = torch.stack([self._vectors[i].difference(name).float() for i in there])
        matrix = Matrix(name, changes.to(self._device), there)
        is_matrix = changes.dim() == 3 and min(changes.shape[1:]) > 1
        moved = (self._rule if is_matrix else self._otherwise)(matrix).cpu().reshape(-1)
        after = cast(flat, torch.float64) + moved.double()
        np.copyto(
            as_integers(flat),
            as_integers(round_once(after, flat.dtype)),
            where=moved.numpy() != 0,
        )

    def _mean(self, matrix: Matrix) -> Tensor:
        return matrix.changes.sum(0) / len(self._vectors)


def nearest_orthogonal(factors: Tensor) -> Tensor:
    """The matrix with orthonormal columns (or rows) that is nearest: P R^T of its SVD P Q R^T."""
    left, _, right = svd(factors)
    return left @ right


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors as columns, singular values from the largest, right vectors as rows."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right
