"""The deltas of members: masks with finetuned values, subspaces, or whole finetuned models."""

from pathlib import Path

from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.factor_file import KIND, FactorFile
from restitch.merging.files.header import read_header
from restitch.merging.files.sparse import SparseFile
from restitch.merging.files.whole_weights import WholeWeights

Delta = SparseFile | FactorFile | WholeWeights


def open_delta(path: Path, base: Checkpoint | None = None) -> SparseFile | FactorFile:
    """Open a member's delta, or a patch.

    Args:
        path: the file.
        base: the base of the delta, required to read sparse values in 8 bits.
    """
    if read_header(path).metadata.get("restitch.kind") == KIND:
        return FactorFile.open(path)
    return SparseFile.open(path, base)
