"""Signals of pairs against cases by hand, and rank correlations against scipy."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from restitch.merging.analysis.pairs import PairSignals, pair_signals, rank_correlation
from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.delta import Delta
from restitch.merging.files.sparse import SparseFile, SparseTensor, write_sparse
from restitch.merging.numerics.factors import Factors
from tests import tiny
from tests.merging.analysis.test_subspaces import file_of, matrix


def delta(path: Path, base: Checkpoint, **changes: dict[int, float]) -> SparseFile:
    """A delta with the base's weights changed at some coordinates."""

    def kept(name: str, changed: dict[int, float]) -> SparseTensor:
        before = base.tensor(name).reshape(-1)
        at = torch.tensor(sorted(changed))
        values = before[at] + torch.tensor([changed[int(i)] for i in at])
        return SparseTensor(name, base.info(name).shape, at, values)

    write_sparse(path, (kept(*each) for each in changes.items()), kind="delta", metadata={})
    return SparseFile.open(path)


def test_signals_of_masks_by_hand(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", {"v": torch.zeros(8), "w": torch.zeros(4)})
    one = delta(tmp_path / "one", base, v={0: 1.0, 1: 2.0, 2: -1.0, 5: 1.0})
    other = delta(tmp_path / "other", base, v={1: 1.0, 2: 3.0, 5: -2.0}, w={3: 4.0})
    found = pair_signals(base, {"a": one, "b": other})[("a", "b")]
    # Three common coordinates of five; two of them change in opposite directions.
    assert (found.shared, found.subspace_overlap) == (3 / 5, None)
    assert found.sign_conflict == pytest.approx(2 / 3, abs=1e-6)
    assert found.cosine == pytest.approx((2 - 3 - 2) / math.sqrt(7 * (1 + 9 + 4 + 16)), abs=1e-6)


def test_members_without_a_common_tensor_have_no_conflict(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", {"v": torch.zeros(8), "w": torch.zeros(4)})
    one = delta(tmp_path / "one", base, v={0: 1.0})
    other = delta(tmp_path / "other", base, w={3: 4.0})
    found = pair_signals(base, {"a": one, "b": other})[("a", "b")]
    assert found == PairSignals(0.0, None, 0.0, None)


def test_the_overlap_of_subspaces_is_that_of_their_factors(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", {"w": torch.zeros(4, 6)})
    rows, columns = torch.eye(4), torch.eye(6)
    half = (columns[0] + columns[2]) / 2**0.5
    files: dict[str, Delta] = {
        "a": file_of(tmp_path / "a", matrix(rows[:, :1], columns[:1])),
        "b": file_of(tmp_path / "b", matrix(2 * rows[:, :1], half[None])),
    }
    found = pair_signals(base, files)[("a", "b")]
    assert found.subspace_overlap == pytest.approx(0.75)
    assert found.shared == 0.5
    assert found.sign_conflict == 0.0


def test_masks_of_a_matrix_have_the_overlap_of_their_leading_subspaces(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", {"w": torch.zeros(4, 6)})
    whole = Factors(torch.eye(4)[:, :1], torch.eye(6)[:1], 1.0).product()
    assert whole[0, 0] == 1
    files = {
        "a": delta(tmp_path / "a", base, w={0: 1.0}),
        "b": delta(tmp_path / "b", base, w={0: -3.0}),
        "c": delta(tmp_path / "c", base, w={7: 1.0}),
    }
    found = pair_signals(base, files)
    assert found[("a", "b")].subspace_overlap == pytest.approx(1.0)
    assert found[("a", "b")].sign_conflict == 1.0
    assert found[("a", "b")].cosine == pytest.approx(-1.0)
    assert found[("a", "c")].subspace_overlap == pytest.approx(0.0)


def test_a_delta_of_another_base_is_refused(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", {"w": torch.zeros(3)})
    other = tiny.save(tmp_path / "other", {"w": torch.zeros(4)})
    with pytest.raises(BadInput, match="does not fit the base"):
        pair_signals(base, {"a": delta(tmp_path / "a", other, w={0: 1.0})})


def test_rank_correlations_by_hand() -> None:
    # Of the 24 orders of four values, two are as extreme as the perfect one.
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 99]) == pytest.approx((1.0, 2 / 24))
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx((-1.0, 2 / 6))
    assert rank_correlation([1, 2], [1, 2]) == (None, None)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == (None, None)
    assert rank_correlation([], []) == (None, None)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=12))
def test_rank_correlations_are_those_of_scipy(pairs: list[tuple[int, int]]) -> None:
    one, other = zip(*pairs, strict=True)
    rho, p_value = rank_correlation(one, other)
    if len(set(one)) == 1 or len(set(other)) == 1:
        assert rho is None
    else:
        assert rho == pytest.approx(spearmanr(one, other).statistic, abs=1e-9)
        assert p_value is not None
        assert 0 < p_value <= 1
