"""Singular value calibration against a plain float64 reference, and cases by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch

from restitch.merging.errors import BadInput
from restitch.merging.files.edits import edited
from restitch.merging.methods.registry import get_method, method_names
from restitch.merging.methods.svc import FLOORS, calibrated
from restitch.merging.rules.stitch import sparse_delta
from tests import tiny
from tests.merging.rules.test_per_matrix import Matrix, changes_of, whole_members

AFTER = ("task-arithmetic", "ties", "tsv-m")


def reference(change: Matrix, changes: list[Matrix], floor: float) -> Matrix:
    """The paper's algorithm, direction by direction."""
    left, values, right = np.linalg.svd(change, full_matrices=False)
    found = np.zeros_like(change)
    for r, value in enumerate(values):
        merged = left[:, r] @ change
        counts = []
        for one in changes:
            own = left[:, r] @ one
            counts.append(max(floor, merged @ own / (own @ own) if own.any() else 0.0))
        found += value * len(changes) / sum(counts) * np.outer(left[:, r], right[r])
    return found


@pytest.mark.parametrize("floor", [0.1, 1.0])
@pytest.mark.parametrize("shape", [(8, 8), (12, 7), (6, 20)])
def test_it_matches_its_reference(shape: tuple[int, int], floor: float) -> None:
    changes = changes_of(3, shape)
    plain = [np.asarray(change.double()) for change in changes]
    found = calibrated(changes.sum(0), changes, floor)
    wanted = reference(np.asarray(sum(plain)), plain, floor)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-3, atol=1e-4)


def test_what_all_tasks_share_counts_once() -> None:
    change = torch.zeros(3, 2)
    change[0, 0], change[1, 1] = 2.0, 1.0
    changes = torch.stack([change, change, change])
    for floor in (0.1, 1.0):
        assert torch.allclose(calibrated(changes.sum(0), changes, floor), change, atol=1e-6)


def test_the_floor_decides_about_directions_of_a_single_task() -> None:
    changes = torch.zeros(2, 2, 2)
    changes[0, 0, 0], changes[1, 1, 1] = 3.0, 1.0
    together = changes.sum(0)
    # Its own task finds it whole, the other one counts as the floor: 2 / (1 + floor).
    assert torch.allclose(calibrated(together, changes, 1.0), together, atol=1e-6)
    assert torch.allclose(calibrated(together, changes, 0.25), together * 1.6, atol=1e-6)


def test_with_equal_singular_values_the_directions_are_those_of_the_sum() -> None:
    changes = changes_of(3, (7, 5))
    left, _, right = torch.linalg.svd(changes.sum(0), full_matrices=False)
    found = calibrated(2.0 * left @ right, changes, 0.1)
    # The same as with singular values that differ, for only directions and responses count.
    falling = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    wanted = calibrated((left * falling) @ right, changes, 0.1)
    scales = [torch.diagonal(left.mT @ one @ right.mT) for one in (found, wanted)]
    counts = [
        (torch.diagonal(left.mT @ one @ right.mT) / (left.mT @ one).square().sum(1))
        for one in changes
    ]
    for r in range(5):
        for scale, value in zip(scales, (2.0, float(falling[r])), strict=True):
            met = sum(max(0.1, value * float(count[r])) for count in counts)
            assert float(scale[r]) == pytest.approx(value * 3 / met, rel=1e-3)


def test_a_coefficient_of_the_method_before_cancels_out() -> None:
    shared = changes_of(1, (6, 5)).repeat(2, 1, 1)
    one, other = (calibrated(part, shared, 0.1) for part in (shared.sum(0), shared.mean(0)))
    assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("name", AFTER)
def test_it_is_a_streamed_step_after_a_method(tmp_path: Path, name: str) -> None:
    base = tiny.save(tmp_path / "base", tiny.base_tensors())
    members = whole_members(tmp_path, base, 3)
    inner = get_method(name)(base, members)
    one, other = (
        get_method("svc")(base, some, after=name, alpha=0.5) for some in (members, members[::-1])
    )
    assert one.names == inner.names
    for tensor in one.names:
        found, before = edited(base, one, tensor), base.tensor(tensor)
        assert torch.equal(found, edited(base, other, tensor))
        change = (edited(base, inner, tensor) - before).numpy().astype(np.float64)
        if before.dim() == 2:
            plain = [
                np.asarray((sparse_delta(m).values(tensor).view(before.shape) - before).double())
                for m in sorted(members, key=lambda member: member.task)
            ]
            change = reference(change, plain, FLOORS.get(name, 0.1))
        np.testing.assert_allclose((found - before).numpy(), 0.5 * change, atol=2e-4)


def test_a_base_of_16_bits_is_rounded_once(tmp_path: Path) -> None:
    tensors = tiny.base_tensors(dtype=torch.bfloat16)
    base = tiny.save(tmp_path / "base", tensors)
    members = whole_members(tmp_path, base, 2)
    edits = get_method("svc")(base, members, after="averaging")
    norm = "layers.0.norm.weight"
    mean = (
        sum(sparse_delta(m).values(norm).float() - base.tensor(norm).float() for m in members) / 2
    )
    assert torch.equal(edited(base, edits, norm), (base.tensor(norm).float() + mean).bfloat16())
    assert edited(base, edits, "layers.0.attn.weight").dtype == torch.bfloat16


def test_methods_that_it_cannot_follow_are_refused(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", tiny.base_tensors())
    for name in ("svc", "localize-and-stitch"):
        with pytest.raises(BadInput, match=f"svc cannot come after {name}") as caught:
            get_method("svc")(base, (), after=name)
        assert "tsv-m" in str(caught.value.expected)
        assert "svc" not in str(caught.value.expected)
    with pytest.raises(BadInput, match="did you mean 'tsv-m'"):
        get_method("svc")(base, (), after="tsv")
    needing = [name for name in method_names() if get_method(name).needs]
    for name in needing:
        with pytest.raises(BadInput, match="alone"):
            get_method("svc")(base, (), after=name)
