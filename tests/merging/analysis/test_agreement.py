"""How many masks agree on a weight: a case by hand, and a slow reference."""

from pathlib import Path

import torch

from restitch.merging.analysis.agreement import agreement_profile, kept_profile
from restitch.merging.files.sparse import SparseFile, SparseTensor, write_sparse
from restitch.merging.rules.consensus import task_arithmetic_sum, ties_sum
from restitch.merging.rules.stitch import DeltaMember
from tests import tiny


def members(folder: Path, vectors: dict[str, list[float]]) -> list[DeltaMember]:
    found = []
    for task, values in vectors.items():
        tensor = SparseTensor("w", (len(values),), torch.arange(len(values)), torch.tensor(values))
        write_sparse(folder / task, [tensor], kind="delta", metadata={})
        found.append(DeltaMember(task, SparseFile.open(folder / task)))
    return found


def test_weights_are_counted_by_the_number_of_tasks_that_need_them(tmp_path: Path) -> None:
    base = tiny.save(tmp_path, {"w": torch.zeros(4), "untouched": torch.zeros(3)})
    # Alone; needed by both; small beside the other; of opposite signs, so that their sum is small.
    some = members(tmp_path, {"a": [1.0, 1.0, 1.0, 1.0], "b": [0.0, 1.0, 9.0, -1.0]})
    found = agreement_profile(base, some, ("untouched", "w"), task_arithmetic_sum, 0.4)
    # First: a has 1 >= 0; b has 0 >= 0.4 * 1, no. Third: a has 1 >= 0.4 * 9, no.
    assert found == (3, 2, 2)


def test_streamed_counts_are_those_of_whole_vectors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tiny.save(tmp_path, {"w": torch.randn(1000)})
    values = {task: (base.tensor("w") + torch.randn(1000)).tolist() for task in "abc"}
    some = members(tmp_path, values)
    vectors = [torch.tensor(v).double() - base.tensor("w").double() for v in values.values()]
    trimmed = [torch.where(v.abs() >= v.abs().kthvalue(801).values, v, 0.0) for v in vectors]
    sign = torch.stack(trimmed).sum(0).sign()
    agreeing = torch.stack([torch.where(v.sign() == sign, v, 0.0) for v in trimmed]).sum(0)
    for together, maker in (
        (torch.stack(vectors).sum(0), task_arithmetic_sum),
        (agreeing, ties_sum),
    ):
        masks = torch.stack([v.abs() >= 0.4 * (together - v).abs() for v in vectors])
        expected = torch.bincount(masks.sum(0), minlength=4).tolist()
        assert list(agreement_profile(base, some, ("w",), maker, 0.4)) == expected


def test_masks_of_deltas_are_counted_unchanged(tmp_path: Path) -> None:
    base = tiny.save(tmp_path, {"w": torch.zeros(5)})
    some = []
    for task, kept in (("a", [0, 1, 2]), ("b", [2, 3])):
        tensor = SparseTensor("w", (5,), torch.tensor(kept), torch.ones(len(kept)))
        write_sparse(tmp_path / task, [tensor], kind="delta", metadata={})
        some.append(DeltaMember(task, SparseFile.open(tmp_path / task)))
    assert kept_profile(base, some, ("w",)) == (1, 3, 1)
