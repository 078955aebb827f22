"""DC-Merge against a slow dense float64 reference, and cases by hand."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from restitch.merging.errors import BadInput
from restitch.merging.methods.dc_merge import merged
from restitch.merging.methods.registry import get_method
from restitch.merging.numerics.decompositions import svd
from tests import tiny
from tests.merging.rules.test_per_matrix import Matrix, changes_of, orthogonal


def reference(changes: Sequence[Matrix], kept: int, entries: int) -> Matrix:
    """The paper's algorithm, entry by entry."""
    count = len(changes)
    triplets = [np.linalg.svd(change) for change in changes]
    left = orthogonal(np.hstack([u[:, :kept] for u, _, _ in triplets]))
    right = orthogonal(np.hstack([v[:kept].T for _, _, v in triplets]))
    inside = []
    for u, s, v in triplets:
        cut = sum(s[i] * np.outer(u[:, i], v[i]) for i in range(kept))
        matrix = left.T @ cut @ right
        least = sorted(abs(matrix).ravel())[-entries]
        inside.append(np.where(abs(matrix) >= least, matrix, 0.0))
    middle = np.zeros_like(inside[0])
    for row in range(count * kept):
        for column in range(count * kept):
            if row // kept == column // kept:
                values = [matrix[row, column] for matrix in inside]
                agree = [value for value in values if value * sum(values) > 0]
                middle[row, column] = np.mean(agree) if agree else 0.0
    return np.asarray(left @ middle @ right.T)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([(8, 8), (12, 7), (6, 20)]),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.1, 0.3, 1.0]),
    st.sampled_from([0.2, 0.3, 1.0]),
)
def test_it_matches_its_reference(
    shape: tuple[int, int], count: int, density: float, share: float
) -> None:
    changes, rank = changes_of(count, shape), min(shape)
    kept = max(1, min(rank // count, int(share * rank + 0.5)))
    side = count * (rank // count)
    entries = min(max(1, int(density * side * side + 0.5)), (count * kept) ** 2)
    found = merged(changes, rank, density, share)
    wanted = reference([np.asarray(change.double()) for change in changes], kept, entries)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-3, atol=1e-5)


def test_of_tasks_in_directions_of_their_own_the_largest_entries_stay() -> None:
    changes = torch.zeros(2, 4, 4)
    changes[0, 0, 0], changes[0, 1, 1] = 3.0, 2.0
    changes[1, 2, 2], changes[1, 3, 3] = 5.0, 1.0
    assert torch.allclose(merged(changes, 4, 1.0), changes.sum(0), atol=1e-6)
    # 1/16 of 4 x 4 entries is one of each member.
    largest = torch.diag(torch.tensor([3.0, 0.0, 5.0, 0.0]))
    assert torch.allclose(merged(changes, 4, 1 / 16), largest, atol=1e-6)


def test_rounding_is_no_agreement() -> None:
    # Directions without overlap, but turned: products that should be 0 are rounding.
    left, right = (torch.linalg.qr(one)[0] for one in changes_of(2, (8, 8)))
    values = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    changes = torch.stack(
        [left[:, own] @ values @ right[:, own].T for own in (slice(0, 4), slice(4, 8))]
    )
    assert torch.allclose(merged(changes, 8, 1.0), changes.sum(0), atol=1e-5)


@pytest.mark.parametrize(("other", "wanted"), [(1.0, 1.0), (-1.0, 1.5), (-3.0, 0.0)])
def test_in_a_direction_of_two_tasks_those_with_the_sign_of_the_sum_are_averaged(
    other: float, wanted: float
) -> None:
    # Both vectors of the basis are the direction over the root of 2, so that M_t has s_t / 2
    # everywhere: 1.5 and 0.5 have the mean 1; 1.5 and -0.5 give 1.5; 1.5 and -1.5 elect no sign.
    changes = torch.zeros(2, 3, 3)
    changes[0, 0, 0], changes[1, 0, 0] = 3.0, other
    found = merged(changes, 3, 1.0)
    assert torch.allclose(found, torch.diag(torch.tensor([wanted, 0.0, 0.0])), atol=1e-6)


def test_members_that_change_nothing_leave_the_others_as_they_are() -> None:
    (change,) = changes_of(1, (6, 6))
    low = change[:, :2] @ change[:2]
    both = torch.stack([low, torch.zeros_like(low)])
    assert torch.allclose(merged(both, 6, 1.0), low, atol=1e-6)
    assert not merged(torch.zeros_like(both), 6).any()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_calibrated_the_members_meet_themselves_on_average(count: int) -> None:
    changes, kept = changes_of(count, (12, 7)), 7 // count
    found = merged(changes, 7, 1.0, calibrate=True)
    leading = [(u[:, :kept] * s[:kept]) @ v[:kept] for u, s, v in map(svd, changes)]
    met = sum(float((found * one).sum()) for one in leading)
    assert met == pytest.approx(sum(float(one.square().sum()) for one in leading), rel=1e-4)
    if count == 1:
        assert torch.allclose(found, changes[0], atol=1e-5)


def test_settings_out_of_range_are_refused(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", tiny.base_tensors())
    for name, value in (("alpha", -1.0), ("density", 1.5)):
        with pytest.raises(BadInput, match=f"the setting {name} is out of range"):
            get_method("dc-merge")(base, (), **{name: value})
