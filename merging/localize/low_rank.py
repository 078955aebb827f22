"""The change of a merged model as low-rank factors, for an adapter.

Two passes over the matrices: the first takes all singular values, from which the ranks are chosen
together, and the second takes the triplets. Memory holds one matrix.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.edits import Edits, edited
from restitch.merging.localize.subspace import leading
from restitch.merging.numerics.factors import Factors
from restitch.merging.progress import Progress, ignore
from restitch.merging.ranking.allotment import Squares


def change_of(base: Checkpoint, edits: Edits, name: str) -> Tensor:
    """Merged minus base of one tensor, float32."""
    return edited(base, edits, name).float() - base.tensor(name).float()


def squared_singular_values(
    base: Checkpoint,
    edits: Edits,
    names: Sequence[str],
    device: torch.device,
    progress: Progress = ignore,
) -> dict[str, Squares]:
    """The squared singular values of the change of each matrix, in falling order.

    They are the eigenvalues of the smaller of D D^T and D^T D, in float64.
    """
    found = {}
    for done, name in enumerate(names, 1):
        change = change_of(base, edits, name).to(device, torch.float64)
        small = change if change.shape[0] <= change.shape[1] else change.mT
        values = torch.linalg.eigvalsh(small @ small.mT).clamp_min_(0).flip(0)
        found[name] = values.cpu().numpy()
        progress(done, len(names))
    return found


def factors_of(
    base: Checkpoint,
    edits: Edits,
    ranks: Mapping[str, int],
    device: torch.device,
    progress: Progress = ignore,
) -> Iterator[tuple[str, Factors]]:
    """The leading triplets of the change of each matrix with a rank above 0."""
    chosen = {name: rank for name, rank in ranks.items() if rank}
    for done, (name, rank) in enumerate(chosen.items(), 1):
        yield name, leading(change_of(base, edits, name).to(device), rank)
        progress(done, len(chosen))
