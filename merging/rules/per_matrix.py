"""Merge methods that work on whole weight matrices, with an SVD or a small optimization problem.

A rule receives the members' task vectors of one matrix and returns the merged one. Tensors of other
shapes get the mean, unless the method has another rule for them. Computed in float32 and rounded
once; where the merged task vector is 0, the base's bits stay. If all members keep factors of a
matrix and their ranks together are below its own, the rule works in the *core space* (Core Space
Merging, 2025, arXiv 2509.17786): with orthonormal bases Q of all left and R of all right factors,
it merges the small matrices Q^T D_t R^T, and the result is Q M R. Decompositions and optimizer
steps differ in their last bits between machines, so such a method is `numeric` and may compute on a
GPU (`computing_on`). Memory holds one matrix of each member at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from restitch.merging.numerics.bitwise import as_integers
from restitch.merging.numerics.decompositions import orthonormal, svd
from restitch.merging.numerics.factors import above_rounding
from restitch.merging.numerics.rounding import cast, round_once
from restitch.merging.order import by_bytes
from restitch.merging.rules.merge_inputs import MergeInputs


@dataclass(frozen=True)
class Matrix:
    """The task vectors of one tensor.

    Attributes:
        name: the tensor.
        changes: members x rows x columns, float32, on the device for the computation; in the core
            space, if there is one.
        members: the numbers of the members that have the tensor, in the order of their tasks.
        rank: the smaller side of the tensor itself.
        core: the bases of the core space; None if `changes` has the shape of the tensor.
    """

    name: str
    changes: Tensor
    members: tuple[int, ...]
    rank: int
    core: "Core | None" = None

    def projected(self, change: Tensor) -> Tensor:
        """A change of the tensor's own shape in the space of `changes`."""
        return change if self.core is None else self.core.left.mT @ change @ self.core.right.mT


@dataclass(frozen=True)
class Core:
    """The space that the factors of all members span.

    Attributes:
        left: rows x size, with orthonormal columns.
        right: size x columns, with orthonormal rows.
    """

    left: Tensor
    right: Tensor


Rule = Callable[[Matrix], Tensor]

_device: ContextVar[torch.device | None] = ContextVar("device", default=None)


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """Let methods that are called in this block compute their matrices on `device`."""
    before = _device.set(device)
    try:
        yield
    finally:
        _device.reset(before)


class PerMatrix:
    """The edits of a rule.

    Args:
        inputs: the base and the members, each with its whole task vector.
        rule: merges the task vectors of a matrix.
        otherwise: merges those of a tensor that is not a matrix; by default the mean.
        in_core: whether the rule may work in the core space. One that needs more than task vectors
            may not.
    """

    def __init__(
        self,
        inputs: MergeInputs,
        rule: Rule,
        otherwise: Rule | None = None,
        *,
        in_core: bool = True,
    ) -> None:
        self._vectors = inputs.vectors
        self._rule = rule
        self._otherwise = otherwise or self._mean
        self._may_use_core = in_core
        self._device = _device.get() or torch.device("cpu")
        self.names = tuple(sorted({n for v in self._vectors for n in v.names}, key=by_bytes))

    def apply(self, name: str, flat: Tensor) -> None:
        """Overwrite weights in a flat copy of the base's tensor."""
        members = tuple(i for i, vector in enumerate(self._vectors) if name in vector)
        matrix = self._in_core(name, members) or self._whole(name, members)
        is_matrix = matrix.changes.dim() == 3 and matrix.rank > 1
        merged = (self._rule if is_matrix else self._otherwise)(matrix)
        if matrix.core is not None:
            merged = matrix.core.left @ merged @ matrix.core.right
        moved = merged.cpu().reshape(-1)
        after = cast(flat, torch.float64) + moved.double()
        np.copyto(
            as_integers(flat),
            as_integers(round_once(after, flat.dtype)),
            where=moved.numpy() != 0,
        )

    def _whole(self, name: str, members: tuple[int, ...]) -> Matrix:
        changes = torch.stack([self._vectors[i].difference(name).float() for i in members])
        return Matrix(name, changes.to(self._device), members, min(changes.shape[1:], default=1))

    def _in_core(self, name: str, members: tuple[int, ...]) -> Matrix | None:
        """The task vectors in the space of all factors; None if it is not smaller or not wanted."""
        if not self._may_use_core:
            return None
        shape = self._vectors[members[0]].shape(name)
        factors = [f for f in (self._vectors[i].low_rank(name) for i in members) if f is not None]
        if len(shape) != 2 or len(factors) < len(members):
            return None
        if sum(each.rank for each in factors) >= min(shape):
            return None
        lefts = [each.left.float().to(self._device) for each in factors]
        rights = [each.right.float().to(self._device) for each in factors]
        core = Core(orthonormal(torch.cat(lefts, 1)), orthonormal(torch.cat(rights).mT).mT)
        changes = torch.stack(
            [
                each.scale * (core.left.mT @ left) @ (right @ core.right.mT)
                for each, left, right in zip(factors, lefts, rights, strict=True)
            ]
        )
        return Matrix(name, changes, members, min(shape), core)

    def _mean(self, matrix: Matrix) -> Tensor:
        return matrix.changes.sum(0) / len(self._vectors)


def nearest_orthogonal(vectors: Tensor) -> Tensor:
    """The orthonormal columns (or rows) nearest to some vectors, in the space of these alone.

    P R^T of the SVD P Q R^T, without the directions where Q is 0 up to rounding: the SVD gives
    arbitrary ones there. Vectors that are equal or 0 then share the directions that there are.
    """
    left, values, right = svd(vectors)
    return (left * above_rounding(values, max(vectors.shape))) @ right
