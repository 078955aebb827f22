"""Speed of subspaces on the shapes of a language model of 1.1 B weights.

    python -m benchmarks.core_space [--members 8] [--rank 16] [--json FILE]

For the matrices of one block: localizing a full-rank task vector by random subspace iteration, next
to a whole decomposition; and merging members of a low rank by `tsv-m` from their factors, next to
the same merge of whole task vectors. The second of each pair is the reference. All blocks have the
same shapes, so the ratios are those of the model.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from safetensors.torch import save_file

from benchmarks.speed import HIDDEN, INTERMEDIATE, KV
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.edits import edited
from restitch.merging.files.factor_file import FactorFile, FactorTensor, write_factors
from restitch.merging.files.sparse import SparseFile, SparseTensor, write_sparse
from restitch.merging.localize.subspace import leading
from restitch.merging.methods.registry import get_method
from restitch.merging.numerics.factors import Factors
from restitch.merging.rules.stitch import DeltaMember

# The attention and the MLP of one block: queries and outputs, keys and values, gates.
SHAPES = {
    "k": (KV, HIDDEN),
    "q": (HIDDEN, HIDDEN),
    "up": (INTERMEDIATE, HIDDEN),
}
COUNTS = {"k": 2, "q": 2, "up": 3}
BLOCKS = 22
SHARE = 1 / 24

T = TypeVar("T")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the ratios."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.core_space")
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    out = Console(width=100)
    found = {**localizing(), **merging(options.members, options.rank)}
    for name, value in found.items():
        out.print(f"{name}: {value:.3g}")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2))


def localizing() -> dict[str, float]:
    """Seconds of keeping 1/24 of the rank, and of whole decompositions, for a model."""
    fast = slow = 0.0
    worst = 1.0
    for name, shape in SHAPES.items():
        change = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        change *= torch.linspace(1, 0.1, shape[1])
        rank = round(SHARE * min(shape))
        seconds, kept = timed(partial(leading, change, rank))
        whole, triplets = timed(partial(torch.linalg.svd, change, full_matrices=False))
        best = triplets[1][:rank].square().sum()
        worst = min(worst, float(kept.product().square().sum() / best))
        fast += COUNTS[name] * BLOCKS * seconds
        slow += COUNTS[name] * BLOCKS * whole
    return {
        "localizing, seconds for the model": fast,
        "by whole decompositions": slow,
        "ratio of localizing": slow / fast,
        "least share of the best squared norm": worst,
    }


def merging(members: int, rank: int) -> dict[str, float]:
    """Seconds of merging one block by tsv-m from factors, and from whole task vectors."""
    fast = slow = worst = 0.0
    with tempfile.TemporaryDirectory(prefix="restitch-bench-") as folder:
        for name, shape in SHAPES.items():
            base, factored, whole = _members(Path(folder), name, shape, members, rank)
            seconds, one = timed(partial(_merged, base, factored, name))
            reference, other = timed(partial(_merged, base, whole, name))
            fast += COUNTS[name] * seconds
            slow += COUNTS[name] * reference
            worst = max(worst, float((one - other).norm() / other.norm()))
    return {
        "merging a block from factors, seconds": fast,
        "from whole task vectors": slow,
        "ratio of merging (goal: 20)": slow / fast,
        "largest relative difference (goal: 1e-4)": worst,
    }


def _merged(base: Checkpoint, members: Sequence[DeltaMember], name: str) -> torch.Tensor:
    """The change of a merge by tsv-m."""
    return edited(base, get_method("tsv-m")(base, members), name) - base.tensor(name)


def _members(
    folder: Path, name: str, shape: tuple[int, int], count: int, rank: int
) -> tuple[Checkpoint, list[DeltaMember], list[DeltaMember]]:
    """A base of one matrix, and members of a low rank: their factors and their whole weights."""
    here = folder / name
    here.mkdir()
    save_file({name: torch.zeros(shape)}, here / "model.safetensors")
    base = Checkpoint.open(here)
    factored, whole = [], []
    everywhere = torch.arange(shape[0] * shape[1])
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        left = torch.randn(shape[0], rank, generator=generator) * 0.01
        right = torch.randn(rank, shape[1], generator=generator)
        task, factors = f"t{number}", Factors(left, right)
        write_factors(
            here / f"{task}.factors",
            [FactorTensor(name, shape, factors, torch.float32)],
            metadata={},
        )
        factored.append(DeltaMember(task, FactorFile.open(here / f"{task}.factors")))
        values = factors.product().view(-1)
        write_sparse(
            here / f"{task}.delta",
            [SparseTensor(name, shape, everywhere, values)],
            kind="delta",
            metadata={},
        )
        whole.append(DeltaMember(task, SparseFile.open(here / f"{task}.delta")))
    return base, factored, whole


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """The seconds of some work, and its result."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


if __name__ == "__main__":
    main()
