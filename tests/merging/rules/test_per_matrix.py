"""Methods of whole matrices against plain float64 references and cases by hand."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.edits import edited
from restitch.merging.files.mask import Mask
from restitch.merging.methods.dc_merge import merged as in_cover
from restitch.merging.methods.iso_c import isotropic
from restitch.merging.methods.iso_cts import merged as common_and_own
from restitch.merging.methods.registry import get_method
from restitch.merging.methods.regmean import solved
from restitch.merging.methods.tsv_m import merged
from restitch.merging.methods.wudi import minimized
from restitch.merging.numerics.decompositions import svd
from restitch.merging.rules.merge_inputs import MergeInputs
from restitch.merging.rules.per_matrix import PerMatrix, computing_on, nearest_orthogonal
from restitch.merging.rules.stitch import DeltaMember, sparse_delta
from tests import tiny

METHODS = ("tsv-m", "dc-merge", "iso-c", "iso-cts", "wudi")
Matrix = NDArray[np.float64]


def whole_members(folder: Path, base: Checkpoint, count: int) -> list[DeltaMember]:
    tensors = {name: base.tensor(name) for name in base.names}
    found = []
    for seed in range(count):
        finetuned = tiny.save(folder / f"{seed}", tiny.finetuned_tensors(tensors, seed))
        mask = Mask.of({n: torch.arange(base.info(n).numel) for n in tiny.LOCALIZABLE})
        delta = tiny.write_delta(folder / f"{seed}.delta", finetuned, mask)
        found.append(DeltaMember("zyxw"[seed], delta))
    return found


def orthogonal(matrix: Matrix) -> Matrix:
    """X (X^T X)^(-1/2), by the eigenvectors of the small side."""
    values, vectors = np.linalg.eigh(matrix.T @ matrix)
    return np.asarray(matrix @ (vectors / np.sqrt(values)) @ vectors.T)


def tsv_reference(changes: Sequence[Matrix], kept: int) -> Matrix:
    lefts, values, rights = [], [], []
    for change in changes:
        left, value, right = np.linalg.svd(change)
        lefts.append(left[:, :kept])
        values.append(value[:kept])
        rights.append(right[:kept].T)
    left, right = orthogonal(np.hstack(lefts)), orthogonal(np.hstack(rights))
    return np.asarray(left @ np.diag(np.hstack(values)) @ right.T)


def iso_reference(changes: Sequence[Matrix]) -> Matrix:
    left, values, right = np.linalg.svd(sum(changes), full_matrices=False)
    return np.asarray(left @ np.diag(np.full(len(values), values.mean())) @ right)


def iso_cts_reference(changes: Sequence[Matrix], common: float) -> Matrix:
    """Algorithm 2 of the paper, one direction after the other."""
    rank = min(changes[0].shape)
    own = round((rank - int(common * rank)) / len(changes))
    shared = rank - own * len(changes)
    left, values, right = np.linalg.svd(sum(changes), full_matrices=False)
    lefts, spectrum, rights = [*left.T[:shared]], [*values[:shared]], [*right[:shared]]
    for change in changes:
        rest = change.copy()
        for direction in left.T[:shared]:
            rest -= np.outer(direction, direction @ change)
        one, values, other = np.linalg.svd(rest, full_matrices=False)
        lefts += [*one.T[:own]]
        spectrum += [*values[:own]]
        rights += [*other[:own]]
    together = orthogonal(np.array(lefts).T) @ orthogonal(np.array(rights).T).T
    return np.asarray(np.mean(spectrum) * together)


def wudi_reference(changes: Sequence[Matrix], steps: int, rate: float) -> Matrix:
    """Adam by hand on the loss as the paper writes it, differentiated automatically."""
    tasks = [torch.tensor(change) for change in changes]
    found = torch.stack(tasks).sum(0).requires_grad_()
    first, second = torch.zeros_like(found), torch.zeros_like(found)
    for step in range(1, steps + 1):
        errors = [((found - one) @ one.T).square().sum() / one.square().sum() for one in tasks]
        (gradient,) = torch.autograd.grad(torch.stack(errors).sum(), found)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        move = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        found = (found - rate * move).detach().requires_grad_()
    return np.asarray(found.detach().numpy())


def changes_of(count: int, shape: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn((count, *shape), generator=generator) * 0.1


@pytest.mark.parametrize("shape", [(8, 8), (12, 7), (6, 20)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_rules_match_their_references(count: int, shape: tuple[int, int]) -> None:
    changes = changes_of(count, shape)
    plain = [np.asarray(change.double()) for change in changes]
    rank = min(shape)
    for found, wanted in (
        (merged(changes, rank), tsv_reference(plain, rank // count)),
        (merged(changes, rank, 2 / rank), tsv_reference(plain, min(2, rank // count))),
        (isotropic(changes.sum(0)), iso_reference(plain)),
        (common_and_own(changes, 0.8), iso_cts_reference(plain, 0.8)),
        (common_and_own(changes, 0.5), iso_cts_reference(plain, 0.5)),
        (minimized(changes, 40, 1e-3), wudi_reference(plain, 40, 1e-3)),
    ):
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-3, atol=1e-5)


def test_tsv_and_wudi_of_one_member_are_the_member(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", tiny.base_tensors())
    (member,) = whole_members(tmp_path, base, 1)
    for name in ("tsv-m", "wudi"):
        edits = get_method(name)(base, [member])
        for tensor in tiny.LOCALIZABLE:
            wanted = sparse_delta(member).values(tensor).view(base.info(tensor).shape)
            assert torch.allclose(edited(base, edits, tensor), wanted, atol=1e-5)


def test_a_share_of_the_rank_keeps_the_leading_directions() -> None:
    changes = torch.zeros(2, 4, 4)
    changes[0, 0, 0], changes[0, 1, 1] = 3.0, 2.0
    changes[1, 2, 2], changes[1, 3, 3] = 5.0, 1.0
    kept = torch.diag(torch.tensor([3.0, 0.0, 5.0, 0.0]))
    assert torch.allclose(merged(changes, 4, 0.25), kept, atol=1e-6)
    # The least is one direction, and the most is 1/T of the rank.
    assert torch.equal(merged(changes, 4, 0.001), merged(changes, 4, 0.25))
    assert torch.equal(merged(changes, 4, 0.9), merged(changes, 4))


@pytest.mark.parametrize("name", ["tsv-m", "dc-merge"])
@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, float("nan")])
def test_a_share_of_the_rank_is_above_0_and_at_most_1(
    tmp_path: Path, name: str, share: float
) -> None:
    base = tiny.save(tmp_path / "base", tiny.base_tensors())
    with pytest.raises(BadInput, match="the setting rank is out of range"):
        get_method(name)(base, (), rank=share)


def test_orthogonal_tasks_are_kept_whole() -> None:
    changes = torch.zeros(2, 4, 4)
    changes[0, 0, 0], changes[0, 1, 1] = 3.0, 2.0
    changes[1, 2, 2], changes[1, 3, 3] = 5.0, 1.0
    assert torch.allclose(merged(changes, 4), changes.sum(0), atol=1e-6)
    assert torch.allclose(minimized(changes, 300, 1e-3), changes.sum(0), atol=1e-6)
    assert torch.allclose(isotropic(changes.sum(0)), 2.75 * torch.eye(4), atol=1e-6)


@pytest.mark.parametrize(
    ("strengths", "wanted"),
    [
        # Each member: how much it changes the first and the second direction.
        ([(3, 0), (3, 0)], (3, 0)),
        ([(3, 0), (3, 0), (0, 5)], (3, 5)),
        ([(3, 0), (1, 0)], (2, 0)),
        ([(3, 0), (-3, 0)], (0, 0)),
        ([(3, 2), (3, 2)], (3, 2)),
        ([(3, 2), (3, 0)], (3, 2)),
    ],
)
def test_a_direction_that_members_share_counts_once(
    strengths: list[tuple[float, float]], wanted: tuple[float, float]
) -> None:
    # Rotated, so that zeros are rounding errors as they are in real models.
    left, right = (torch.linalg.qr(one)[0] for one in changes_of(2, (8, 8)))
    of = torch.stack(
        [left[:, :2] @ torch.diag(torch.tensor(s)).float() @ right[:2] for s in strengths]
    )
    found = left.T @ merged(of, 8) @ right.T
    expected = torch.zeros(8, 8)
    expected[0, 0], expected[1, 1] = wanted
    assert torch.allclose(found, expected, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 2), min_size=1, max_size=3), st.integers(0, 1000), st.data())
def test_members_that_come_twice_in_any_order_count_once(
    ranks: list[int], seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    once = [
        torch.randn(14, rank, generator=generator) @ torch.randn(rank, 12, generator=generator)
        for rank in ranks
    ]
    twice = data.draw(st.permutations([*once, *once]))
    found, wanted = (merged(torch.stack(members), 12) for members in (twice, once))
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.norm()))


def test_of_vectors_with_full_rank_no_direction_is_left_out() -> None:
    for vectors in (changes_of(1, (12, 7))[0], changes_of(1, (6, 20))[0]):
        left, _, right = svd(vectors)
        assert torch.equal(nearest_orthogonal(vectors), left @ right)


def test_directions_that_nobody_changes_stay_as_they_are() -> None:
    left, right = (torch.linalg.qr(one)[0] for one in changes_of(2, (4, 4)))
    change = left @ torch.diag(torch.tensor([4.0, 2.0, 0.0, 0.0])) @ right
    both = torch.stack([change, change])
    # The mean of 4 and 2, and of 8 and 4; after two common directions no member has one of its own.
    for found, mean in ((isotropic(change), 3.0), (common_and_own(both, 0.5), 6.0)):
        wanted = torch.diag(torch.tensor([mean, mean, 0.0, 0.0]))
        assert torch.allclose(left.T @ found @ right.T, wanted, atol=1e-5)
    for nothing in (isotropic(0 * change), common_and_own(0 * both, 0.5), merged(0 * both, 4)):
        assert not nothing.any()


def test_common_directions_come_first_and_each_task_adds_its_own() -> None:
    # Both tasks change the first direction; each has one of its own, which the sum ranks last.
    changes = torch.zeros(2, 4, 4)
    changes[:, 0, 0] = 4.0
    changes[:, 1, 1] = 3.0
    changes[0, 2, 2], changes[1, 3, 3] = 1.0, 2.0
    # Half of the directions are common: 8 and 6; the others are 1 and 2; their mean is 4.25.
    assert torch.allclose(common_and_own(changes, 0.5), 4.25 * torch.eye(4), atol=1e-5)
    # Without a common share nothing of the sum is left: each task has its two leading ones.
    assert torch.allclose(common_and_own(changes, 1.0), isotropic(changes.sum(0)), atol=1e-5)


def test_wudi_minimizes_the_interference_of_opposite_tasks() -> None:
    # The same input direction, wanted 1 by the one and -1 by the other: the middle is best.
    changes = torch.zeros(2, 2, 2)
    changes[0, 0, 0], changes[1, 0, 0] = 1.0, -1.0
    changes[:, 1, 1] = torch.tensor([2.0, 2.0])
    found = minimized(changes, 6000, 1e-3)
    assert torch.allclose(found, torch.tensor([[0.0, 0.0], [0.0, 2.0]]), atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_order_does_not_matter_and_one_dimensional_tensors_are_averaged(
    tmp_path: Path, name: str
) -> None:
    base = tiny.save(tmp_path / "base", tiny.base_tensors())
    members = whole_members(tmp_path, base, 3)
    one, other = get_method(name)(base, members), get_method(name)(base, members[::-1])
    assert one.names == tuple(sorted(tiny.LOCALIZABLE))
    for tensor in one.names:
        assert torch.equal(edited(base, one, tensor), edited(base, other, tensor))
    norm = "layers.0.norm.weight"
    mean = (
        sum(sparse_delta(m).values(norm).double() - base.tensor(norm).double() for m in members) / 3
    )
    wanted = base.tensor(norm).double() + mean
    assert torch.allclose(edited(base, one, norm).double(), wanted, atol=1e-7)
    assert get_method(name).exact is False


@pytest.mark.parametrize("name", METHODS)
def test_no_members_give_the_base(tmp_path: Path, name: str) -> None:
    base = tiny.save(tmp_path / "base", tiny.base_tensors())
    assert get_method(name)(base, ()).names == ()


@pytest.mark.parametrize(
    "rule",
    [
        lambda changes: merged(changes, 4),
        lambda changes: in_cover(changes, 4),
        lambda changes: isotropic(changes.sum(0)),
        lambda changes: common_and_own(changes, 0.8),
        lambda changes: minimized(changes, 2, 1e-3),
        lambda changes: solved(changes, [torch.eye(4, dtype=torch.float64)] * 2, 0.9),
    ],
    ids=["tsv-m", "dc-merge", "iso-c", "iso-cts", "wudi", "regmean"],
)
def test_a_rule_computes_on_the_device_of_its_matrices(rule: Callable[[torch.Tensor], Any]) -> None:
    """On torch's device without numbers: it needs no GPU, and mixing it with another is refused."""
    found = rule(torch.empty((2, 5, 4), device="meta"))
    assert (found.device.type, tuple(found.shape)) == ("meta", (5, 4))


def test_matrices_are_moved_to_the_device_of_the_computation(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", tiny.base_tensors())
    members = whole_members(tmp_path, base, 2)
    seen = []

    def rule(matrix: Any) -> torch.Tensor:
        seen.append(matrix.changes.device.type)
        return torch.zeros(matrix.changes.shape[1:])

    with computing_on(torch.device("meta")):
        there = PerMatrix(MergeInputs(base, members), rule, rule)
    here = PerMatrix(MergeInputs(base, members), rule, rule)
    for edits in (there, here):
        for name in edits.names:
            assert torch.equal(edited(base, edits, name), base.tensor(name))
    count = len(here.names)
    assert seen == ["meta"] * count + ["cpu"] * count
