"""Decompositions of matrices, in as many threads as pay.

The threads of the library of linear algebra wait for each other busily. On small matrices there is
little to share, and on cores with other work the waiting costs many times the computation. So
matrices with a small side are decomposed in one thread; then their last bits do not depend on the
number of cores, either.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# The smaller side up to which several threads were no faster than one.
_SMALL = 512


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors as columns, singular values in falling order, right vectors as rows.

    Args:
        matrix: ... x rows x columns; each matrix is decomposed.
    """
    with _few_threads(matrix):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right


def orthonormal(matrix: Tensor) -> Tensor:
    """An orthonormal basis of the space of the columns: Q of the QR decomposition.

    Args:
        matrix: rows x columns.
    """
    with _few_threads(matrix):
        basis: Tensor = torch.linalg.qr(matrix)[0]
    return basis


@contextmanager
def _few_threads(matrix: Tensor) -> Iterator[None]:
    before = torch.get_num_threads()
    if matrix.device.type != "cpu" or min(matrix.shape[-2:]) > _SMALL or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
