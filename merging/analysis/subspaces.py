"""Overlaps and cosines of the subspaces of some members.

The overlap of two subspaces is the mean squared cosine of the principal angles between them, over
left and right factors and over all matrices that both members keep as factors: 1 if one contains
the other, 0 if they are orthogonal. Two random subspaces of k of r dimensions have about k/r. The
cosine is that of the task vectors that the factors give. Memory holds the factors of one matrix of
every member.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from restitch.merging.analysis.masks import Matrix, cosines
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.delta import Delta
from restitch.merging.numerics.decompositions import orthonormal
from restitch.merging.numerics.factors import Factors
from restitch.merging.order import by_bytes
from restitch.merging.progress import Progress, ignore
from restitch.merging.ranking.member_vector import MemberVector
from restitch.merging.rules.merge_inputs import member_vector
from restitch.merging.rules.stitch import check_fit


@dataclass(frozen=True)
class SubspaceAnalysis:
    """The result of `analyze_subspaces`; rows and columns are in the order of `tasks`.

    Attributes:
        kept: the number of stored numbers by task and tensor.
        coordinates: the number of elements of every tensor that a member changes.
        overlap: None if two members share no matrix.
        cosine: None if one of two task vectors is zero.
    """

    tasks: tuple[str, ...]
    kept: Mapping[str, Mapping[str, int]]
    coordinates: Mapping[str, int]
    overlap: Matrix
    cosine: Matrix

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain = asdict(self) | {"tasks": list(self.tasks)}
        return plain | {name: [list(row) for row in plain[name]] for name in ("overlap", "cosine")}


def analyze_subspaces(
    base: Checkpoint, deltas: Mapping[str, Delta], progress: Progress | None = None
) -> SubspaceAnalysis:
    """Compare the subspaces of members with each other.

    Args:
        base: the base of the deltas.
        deltas: by task, in the order of the result; a delta that keeps no factors has a cosine.
        progress: called with the elements done and the total.

    Raises:
        BadInput: a delta has a tensor that the base does not have in the same shape.
    """
    report = progress or ignore
    for task, delta in deltas.items():
        check_fit(base, task, delta)
    vectors = tuple(member_vector(base, delta) for delta in deltas.values())
    names = sorted({name for vector in vectors for name in vector.names}, key=by_bytes)
    coordinates = {name: base.info(name).numel for name in names}
    shared, least, dots = (np.zeros((len(vectors), len(vectors))) for _ in range(3))
    done = 0
    for name in names:
        _add(name, vectors, shared, least, dots)
        done += coordinates[name]
        report(done, sum(coordinates.values()))
    return SubspaceAnalysis(
        tasks=tuple(deltas),
        kept={task: {n: d.info(n).kept for n in d.names} for task, d in deltas.items()},
        coordinates=coordinates,
        overlap=tuple(
            tuple(float(s / k) if k else None for s, k in zip(*rows, strict=True))
            for rows in zip(shared, least, strict=True)
        ),
        cosine=cosines(dots),
    )


_Sums = NDArray[np.float64]


def _add(
    name: str, members: Sequence[MemberVector], shared: _Sums, least: _Sums, dots: _Sums
) -> None:
    """Add one tensor: squared cosines of angles, their number, and inner products."""
    vectors = {
        i: member.low_rank(name) or member.difference(name)
        for i, member in enumerate(members)
        if name in member
    }
    bases = {
        i: orthonormal_bases(vector) for i, vector in vectors.items() if isinstance(vector, Factors)
    }
    for i, one in vectors.items():
        for j, other in vectors.items():
            if j < i:
                continue
            dots[i, j] += _dot(one, other)
            if i in bases and j in bases:
                met, of = squared_cosines(bases[i], bases[j])
                shared[i, j] += met
                least[i, j] += of
            for sums in (dots, shared, least):
                sums[j, i] = sums[i, j]


Bases = tuple[Tensor, Tensor]


def squared_cosines(one: Bases, other: Bases) -> tuple[float, int]:
    """The sum of the squared cosines of the principal angles, and the number of angles.

    The sum is the mean over both sides; the arguments are those of `orthonormal_bases`.
    """
    met = [(a.mT @ b).square().sum() for a, b in zip(one, other, strict=True)]
    return float(sum(met)) / 2, min(one[0].shape[1], other[0].shape[1])


def orthonormal_bases(factors: Factors) -> Bases:
    """Orthonormal bases of the column space and of the row space."""
    left, right = factors.left.double(), factors.right.double().mT
    return orthonormal(left), orthonormal(right)


def _dot(one: Factors | Tensor, other: Factors | Tensor) -> float:
    if isinstance(one, Factors) and isinstance(other, Factors):
        lefts = one.left.double().mT @ other.left.double()
        rights = one.right.double() @ other.right.double().mT
        return one.scale * other.scale * float((lefts * rights).sum())
    sides = (each.product() if isinstance(each, Factors) else each for each in (one, other))
    first, second = (side.reshape(-1).double() for side in sides)
    return float(first @ second)
