from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from restitch.merging.numerics.decompositions import orthonormal, svd


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (2, 4, 3)])
def test_the_decompositions_multiply_to_the_matrix(shape: tuple[int, ...]) -> None:
    matrix = random(*shape)
    left, values, right = svd(matrix)
    assert torch.allclose(left * values[..., None, :] @ right, matrix, atol=1e-5)
    basis = orthonormal(matrix)
    assert torch.allclose(basis.mT @ basis, torch.eye(basis.shape[-1]), atol=1e-6)
    assert torch.allclose(basis @ (basis.mT @ matrix), matrix, atol=1e-5)


@pytest.mark.usefixtures("two_threads")
def test_small_matrices_have_the_same_bits_with_any_number_of_threads() -> None:
    matrix = random(3000, 100)
    several = (*svd(matrix), orthonormal(matrix))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    for one, other in zip(several, (*svd(matrix), orthonormal(matrix)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("two_threads")
def test_the_threads_come_back_after_an_error() -> None:
    with pytest.raises(RuntimeError):
        svd(torch.full((3, 3), torch.nan))
    assert torch.get_num_threads() == 2
