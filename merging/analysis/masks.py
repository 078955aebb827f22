"""Overlaps, Jaccard indices, cosines and owner counts of the masks of some members.

A pure function of the base and the members' sparse deltas. The Jaccard index of two masks is
|a & b| / |a | b|. The cosine is that of two *masked task vectors*: finetuned minus base at the
coordinates of the model's own mask and zero elsewhere, as in the paper. So it is near zero if two
masks hardly overlap. Sums are float64, tensor by tensor and range by range: memory is bounded by
a part of one tensor. Only coordinates with two or more owners cost work per pair.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from restitch.merging.errors import Damage
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.coordinate_codec import true_positions
from restitch.merging.files.sparse import Piece, SparseFile
from restitch.merging.numerics.rounding import cast
from restitch.merging.order import by_bytes
from restitch.merging.progress import Progress, ignore
from restitch.merging.rules.stitch import check_fit

VERSION = 1

# Coordinates of one step: few enough for a core's cache, and for all work to stay in one thread.
_RANGE = 1 << 15

Matrix = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class MaskAnalysis:
    """The result of `analyze_masks`; rows and columns are in the order of `tasks`.

    Attributes:
        kept: the number of kept coordinates by task and tensor; tensors with 0 are omitted.
        coordinates: the number of elements of every tensor in which a mask keeps a coordinate.
        shared: the number of common coordinates of two masks; on the diagonal the size of one.
        jaccard: None if both masks are empty.
        cosine: of the masked task vectors; None if one of them is zero.
        owners: the number of coordinates with exactly 1, 2, ... owners, up to all members.
    """

    tasks: tuple[str, ...]
    kept: Mapping[str, Mapping[str, int]]
    coordinates: Mapping[str, int]
    shared: tuple[tuple[int, ...], ...]
    jaccard: Matrix
    cosine: Matrix
    owners: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain = asdict(self)
        for name in ("shared", "jaccard", "cosine"):
            plain[name] = [list(row) for row in plain[name]]
        return plain | {"tasks": list(self.tasks), "owners": list(self.owners)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "MaskAnalysis":
        """The analysis of `to_json`'s output; raises `Damage` for anything else."""
        try:
            return cls(
                tasks=tuple(data["tasks"]),
                kept={task: dict(counts) for task, counts in data["kept"].items()},
                coordinates=dict(data["coordinates"]),
                shared=tuple(tuple(row) for row in data["shared"]),
                jaccard=tuple(tuple(row) for row in data["jaccard"]),
                cosine=tuple(tuple(row) for row in data["cosine"]),
                owners=tuple(data["owners"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as err:
            raise Damage(
                "an analysis of masks cannot be read",
                found=f"{type(err).__name__}: {err}",
                hint="remove it from the store; the next analysis creates it again",
            ) from err


def analyze_masks(
    base: Checkpoint, deltas: Mapping[str, SparseFile], progress: Progress | None = None
) -> MaskAnalysis:
    """Compare the masks of members with each other.

    Args:
        base: the base of the deltas.
        deltas: by task, in the order of the result.
        progress: called with the elements done and the total.

    Raises:
        BadInput: a delta has a tensor that the base does not have in the same shape.
    """
    report = progress or ignore
    for task, delta in deltas.items():
        check_fit(base, task, delta)
    names = sorted({name for delta in deltas.values() for name in delta.names}, key=by_bytes)
    coordinates = {name: base.info(name).numel for name in names}
    total, done = sum(coordinates.values()), 0
    sums = _Sums(len(deltas))
    for name in names:
        sums.add(base, name, list(deltas.values()))
        done += coordinates[name]
        report(done, total)
    return MaskAnalysis(
        tasks=tuple(deltas),
        kept={t: {n: d.info(n).kept for n in d.names} for t, d in deltas.items()},
        coordinates=coordinates,
        shared=tuple(tuple(row) for row in sums.shared.tolist()),
        jaccard=_jaccard(sums.shared),
        cosine=cosines(sums.dots),
        owners=tuple(sums.owners.tolist()[1:]),
    )


class _Sums:
    """Sums over all coordinates.

    Attributes:
        shared: the number of common coordinates of each pair, int64.
        dots: inner products of the masked task vectors, float64.
        owners: the number of coordinates with 0, 1, 2, ... owners; the first is not counted.
    """

    def __init__(self, members: int) -> None:
        self.shared = np.zeros((members, members), dtype=np.int64)
        self.dots = np.zeros((members, members))
        self.owners = np.zeros(members + 1, dtype=np.int64)

    def add(self, base: Checkpoint, name: str, deltas: Sequence[SparseFile]) -> None:
        """Add one tensor."""
        rows = [row for row, delta in enumerate(deltas) if name in delta]
        cursors = [deltas[row].cursor(name) for row in rows]
        for part in torch.split(base.tensor(name).reshape(-1), _RANGE):
            taken = [cursor.advance(part.numel()) for cursor in cursors]
            before = cast(part, torch.float64).numpy()
            self._add_range(before, {row: _joined(t) for row, t in zip(rows, taken, strict=True)})

    def _add_range(self, before: NDArray[np.float64], members: Mapping[int, Piece]) -> None:
        owners = np.zeros(len(before), dtype=np.int16)
        vectors = {}
        for row, (coordinates, values) in members.items():
            owners[coordinates] += 1
            vectors[row] = cast(values, torch.float64).numpy() - before[coordinates]
            self.shared[row, row] += len(coordinates)
            # A product of long vectors would start threads.
            self.dots[row, row] += np.einsum("i,i->", vectors[row], vectors[row])
        self.owners[1:] += np.bincount(owners, minlength=len(self.owners))[1:]
        places = true_positions(owners > 1)
        if len(places):
            self._add_shared(owners, places, members, vectors)

    def _add_shared(
        self,
        owners: NDArray[np.int16],
        places: NDArray[np.int64],
        members: Mapping[int, Piece],
        vectors: Mapping[int, NDArray[np.float64]],
    ) -> None:
        column = np.zeros(len(owners), dtype=np.int64)
        column[places] = np.arange(len(places))
        owned = np.zeros((len(members), len(places)), dtype=np.float32)
        changes = np.zeros((len(members), len(places)))
        for line, (row, (coordinates, _)) in enumerate(members.items()):
            chosen = owners[coordinates] > 1
            at = column[coordinates[chosen]]
            owned[line, at] = 1
            changes[line, at] = vectors[row][chosen]
        # Float32 counts exactly here: a range has fewer than 2^24 coordinates.
        pairs = np.ix_(list(members), list(members))
        self.shared[pairs] += _off_diagonal(owned @ owned.T).astype(np.int64)
        self.dots[pairs] += _off_diagonal(changes @ changes.T)


def _joined(pieces: Sequence[Piece]) -> Piece:
    """The pieces of one range as one."""
    if len(pieces) == 1:
        return pieces[0]
    coordinates = [piece[0] for piece in pieces] or [np.empty(0, dtype=np.int64)]
    values = [piece[1] for piece in pieces] or [torch.empty(0)]
    return np.concatenate(coordinates), torch.cat(values)


def _off_diagonal(matrix: NDArray[Any]) -> NDArray[Any]:
    """The matrix without its diagonal, which is summed over all coordinates instead."""
    np.fill_diagonal(matrix, 0)
    return matrix


def _jaccard(shared: NDArray[np.int64]) -> Matrix:
    sizes = shared.diagonal()
    return _quotients(shared, sizes[:, None] + sizes[None, :] - shared)


def cosines(dots: NDArray[np.float64]) -> Matrix:
    """The cosines of some vectors, from their inner products."""
    lengths = np.sqrt(dots.diagonal())
    quotients = _quotients(dots, lengths[:, None] * lengths[None, :])
    # Rounding may lead to a value above 1.
    return tuple(
        tuple(None if value is None else max(-1.0, min(1.0, value)) for value in row)
        for row in quotients
    )


def _quotients(above: NDArray[Any], below: NDArray[Any]) -> Matrix:
    return tuple(
        tuple(a / b if b else None for a, b in zip(row, under, strict=True))
        for row, under in zip(above.tolist(), below.tolist(), strict=True)
    )
