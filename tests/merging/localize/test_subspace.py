"""Leading singular triplets against numpy's decomposition."""

from pathlib import Path

import numpy as np
import pytest
import torch

from restitch.merging.files.factor_file import FactorFile, write_factors
from restitch.merging.localize.subspace import cut, kept_rank, leading, localize_subspace
from restitch.merging.ranking.task_vector import TaskVector
from tests import tiny


def matrix_of(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (2, 2)])
@pytest.mark.parametrize("rank", [1, 2])
def test_the_factors_are_the_leading_triplets(shape: tuple[int, int], rank: int) -> None:
    matrix = matrix_of(*shape)
    left, values, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    wanted = left[:, :rank] * values[:rank] @ right[:rank]
    found = leading(matrix, rank)
    assert found.rank == rank
    np.testing.assert_allclose(found.product().numpy(), wanted, atol=1e-5)
    # Both sides carry the same share of each singular value.
    np.testing.assert_allclose(found.left.norm(dim=0), values[:rank] ** 0.5, rtol=1e-5)
    np.testing.assert_allclose(found.right.norm(dim=1), values[:rank] ** 0.5, rtol=1e-5)


def test_a_large_matrix_keeps_almost_as_much_as_the_exact_triplets_and_always_the_same() -> None:
    matrix = matrix_of(640, 700) * torch.linspace(1, 0.2, 700)  # a spectrum that falls slowly
    found = leading(matrix, 40)
    values = torch.linalg.svdvals(matrix)
    best = values[40:].square().sum().sqrt()
    assert (matrix - found.product()).norm() <= 1.005 * best
    assert torch.equal(found.left, leading(matrix, 40).left)


@pytest.mark.parametrize("shape", [(30, 20), (600, 700)])
def test_triplets_that_are_zero_are_not_kept(shape: tuple[int, int]) -> None:
    matrix = matrix_of(shape[0], 3) @ matrix_of(3, shape[1], 1)
    assert leading(matrix, 10).rank == 3


@pytest.mark.parametrize(
    ("share", "rank"), [(0.083, 32), (1 / 12, 32), (0.0417, 16), (0.001, 1), (1.0, 384)]
)
def test_a_share_of_the_rank_is_rounded_and_at_least_one(share: float, rank: int) -> None:
    assert kept_rank(share, 384, 1536) == rank


def test_a_task_vector_becomes_factors_and_whole_vectors(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", tiny.base_tensors())
    tensors = {name: base.tensor(name) for name in base.names}
    finetuned = tiny.save(tmp_path / "f", tiny.finetuned_tensors(tensors, 1, tiny.LOCALIZABLE[:2]))
    vector = TaskVector(base, finetuned, tiny.LOCALIZABLE)
    seen: list[tuple[int, int]] = []
    found = localize_subspace(vector, 0.25, "exact", progress=lambda *at: seen.append(at))
    write_factors(tmp_path / "x", found, metadata={})
    file = FactorFile.open(tmp_path / "x")
    # The third tensor did not change.
    assert file.names == tiny.LOCALIZABLE[:2]
    matrix, norm = file.names
    assert file.info(matrix).rank == 2
    wanted = leading(vector.difference(matrix), 2).product()
    assert torch.equal(file.difference(matrix), wanted)
    assert torch.equal(file.difference(norm), vector.difference(norm))
    assert seen[-1] == (vector.coordinates, vector.coordinates)


@pytest.mark.parametrize(("values", "dtype"), [("int8", torch.int8), ("bf16", torch.bfloat16)])
def test_fewer_triplets_are_the_first_of_more(
    tmp_path: Path, values: str, dtype: torch.dtype
) -> None:
    base = tiny.save(tmp_path / "base", tiny.base_tensors())
    tensors = {name: base.tensor(name) for name in base.names}
    finetuned = tiny.save(tmp_path / "f", tiny.finetuned_tensors(tensors, 1))
    vector = TaskVector(base, finetuned, tiny.LOCALIZABLE)
    write_factors(tmp_path / "all", localize_subspace(vector, 0.375, "exact"), metadata={})
    write_factors(
        tmp_path / "cut", cut(FactorFile.open(tmp_path / "all"), (), 0.125, values), metadata={}
    )
    write_factors(tmp_path / "own", localize_subspace(vector, 0.125, values), metadata={})
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "own").read_bytes()
    assert FactorFile.open(tmp_path / "cut").info("layers.0.attn.weight").dtype == dtype
