"""Overlaps of subspaces against cases by hand and a dense reference."""

from pathlib import Path

import pytest
import torch

from restitch.merging.analysis.subspaces import analyze_subspaces
from restitch.merging.errors import BadInput
from restitch.merging.files.factor_file import FactorFile, FactorTensor, write_factors
from restitch.merging.numerics.factors import Factors
from tests import tiny

SHAPE = (4, 6)


def file_of(path: Path, *tensors: FactorTensor) -> FactorFile:
    write_factors(path, tensors, metadata={})
    return FactorFile.open(path)


def matrix(left: torch.Tensor, right: torch.Tensor, scale: float = 1.0) -> FactorTensor:
    return FactorTensor("w", SHAPE, Factors(left, right, scale), torch.float32)


def test_overlaps_by_hand(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", {"w": torch.zeros(SHAPE)})
    rows, columns = torch.eye(4), torch.eye(6)
    half = (columns[0] + columns[2]) / 2**0.5
    files = {
        "a": file_of(tmp_path / "a", matrix(rows[:, :1], columns[:1])),
        # The same column, and a row at 45 degrees: (1 + 1/2) / 2.
        "b": file_of(tmp_path / "b", matrix(2 * rows[:, :1], half[None])),
        "c": file_of(tmp_path / "c", matrix(rows[:, 1:3], columns[3:5])),
        # It contains a.
        "d": file_of(tmp_path / "d", matrix(rows[:, :2], columns[:2], 0.5)),
    }
    found = analyze_subspaces(base, files)
    overlap = torch.tensor([[value or 0.0 for value in row] for row in found.overlap])
    wanted = torch.tensor(
        [[1, 0.75, 0, 1], [0.75, 1, 0, 0.75], [0, 0, 1, 0.25], [1, 0.75, 0.25, 1]]
    )
    assert torch.allclose(overlap, wanted, atol=1e-6)


def test_the_cosine_is_that_of_the_dense_task_vectors(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", {"v": torch.zeros(5), "w": torch.zeros(SHAPE)})
    generator = torch.Generator().manual_seed(3)
    files = {}
    for task in "abc":
        left, right = torch.randn(4, 2, generator=generator), torch.randn(2, 6, generator=generator)
        norm = FactorTensor("v", (5,), torch.randn(5, generator=generator), torch.float32)
        files[task] = file_of(tmp_path / task, norm, matrix(left, right, 0.3))
    dense = FactorTensor("w", SHAPE, torch.randn(SHAPE, generator=generator), torch.float32)
    files["d"] = file_of(tmp_path / "d", dense)
    found = analyze_subspaces(base, files)
    vectors = torch.stack(
        [
            torch.cat(
                [
                    file.difference(name).reshape(-1) if name in file else torch.zeros(size)
                    for name, size in (("v", 5), ("w", 24))
                ]
            ).double()
            for file in files.values()
        ]
    )
    lengths = vectors.norm(dim=1)
    wanted = vectors @ vectors.mT / lengths[:, None] / lengths
    cosine = torch.tensor(found.cosine, dtype=torch.float64)
    assert torch.allclose(cosine, wanted, atol=1e-6)
    # d keeps no factors, so no angles are known.
    assert found.overlap[3] == (None, None, None, None)
    assert found.kept["a"] == {"v": 5, "w": 20}


def test_a_delta_of_another_base_is_refused(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", {"w": torch.zeros(3, 3)})
    file = file_of(tmp_path / "a", matrix(torch.ones(4, 1), torch.ones(1, 6)))
    with pytest.raises(BadInput, match="does not fit the base"):
        analyze_subspaces(base, {"a": file})
