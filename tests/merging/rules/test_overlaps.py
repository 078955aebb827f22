"""What becomes of shared coordinates: by hand, against a slow reference, and what always holds."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.edits import edited
from restitch.merging.files.sparse import SparseFile, SparseTensor, write_sparse
from restitch.merging.methods.registry import get_method
from restitch.merging.numerics.rounding import round_once
from restitch.merging.rules.stitch import OVERLAPS, DeltaMember, sparse_delta, stitch, write_patch
from tests import tiny

RULES = tuple(rule for rule in OVERLAPS if rule != "mean")


def delta(path: Path, values: dict[int, float], factors: list[float] | None = None) -> SparseFile:
    """A delta on a tensor of 2 x 4."""
    coordinates = torch.tensor(sorted(values))
    kept = torch.tensor([values[int(c)] for c in coordinates])
    weights = None if factors is None else torch.tensor(factors, dtype=torch.bfloat16)
    tensor = SparseTensor("w", (2, 4), coordinates, kept, weights)
    write_sparse(path, [tensor], kind="delta", metadata={})
    return SparseFile.open(path)


def slow(base: Checkpoint, members: list[DeltaMember], name: str, rule: str | float) -> Tensor:
    """The reference: coordinate by coordinate, in Python's own numbers."""
    ordered = sorted(members, key=lambda member: member.task.encode())
    flat = base.tensor(name).clone().view(-1)
    owned: dict[int, list[tuple[float, float | None]]] = {}
    for member in ordered:
        if name not in member.delta:
            continue
        factors = sparse_delta(member).factors(name)
        for at, value in zip(
            sparse_delta(member).coordinates(name).tolist(),
            sparse_delta(member).values(name).double().tolist(),
            strict=True,
        ):
            worth = None
            if factors is not None:
                rows, columns = (part.double().tolist() for part in factors)
                worth = rows[at // len(columns)] * columns[at % len(columns)]
            owned.setdefault(at, []).append((value, worth))
    for at, owners in owned.items():
        before = float(flat[at])
        moves = [value - before for value, _ in owners]
        if len(owners) == 1:
            merged = owners[0][0]
        elif rule == "sum":
            merged = before + total(moves)
        elif rule == "weighted" or isinstance(rule, float):
            known = [worth for _, worth in owners if worth is not None]
            usual = total(known) / len(known) if known else 1.0
            worths = [usual if worth is None else worth for _, worth in owners]
            pulls = [worth * move for worth, move in zip(worths, moves, strict=True)]
            merged = before + growth(len(owners), rule) * (total(pulls) / total(worths))
        else:
            sign = np.sign(total(moves))
            agreeing = [move for move in moves if np.sign(move) == sign]
            merged = before + total(agreeing) / max(len(agreeing), 1)
        flat[at] = round_once(torch.tensor([merged], dtype=torch.float64), flat.dtype)[0]
    return flat.view(base.info(name).shape)


def growth(owners: int, rule: str | float) -> float:
    root = math.sqrt(owners)
    powers = {0.25: math.sqrt(root), 0.5: root, 0.75: root * math.sqrt(root), 1.0: float(owners)}
    return 1.0 if isinstance(rule, str) else powers.get(rule, 1.0)


def total(values: list[float]) -> float:
    """The sum in order; Python's own compensates from 3.12 on."""
    result = 0.0
    for value in values:
        result += value
    return result


def test_a_case_by_hand(tmp_path: Path) -> None:
    base = tiny.save(tmp_path, {"w": torch.ones(2, 4)})
    members = [
        DeltaMember("a", delta(tmp_path / "a", {0: 3.0, 1: 2.0, 5: 5.0}, [1, 2, 1, 3, 1, 1])),
        DeltaMember("b", delta(tmp_path / "b", {5: -1.0, 7: 9.0}, [1, 1, 1, 1, 1, 1])),
        DeltaMember("c", delta(tmp_path / "c", {1: 4.0, 5: 3.0})),
    ]
    # At 1 the owners move by 1 and 3; at 5 by 4, -2 and 2. At 1 `a` is worth 1 x 3 and the other
    # is not known; at 5 `a` is worth 2 x 3, `b` 1 x 1, and `c` is taken to be worth 3.5.
    expected = {
        "sum": (5.0, 5.0),
        "weighted": (1 + (3 * 1 + 3 * 3) / 6, 1 + (6 * 4 - 1 * 2 + 3.5 * 2) / 10.5),
        "elect": (3.0, 4.0),
    }
    for rule, (first, fifth) in expected.items():
        found = edited(base, stitch(base, members, rule), "w")
        expected_weights = torch.tensor([[3.0, first, 1.0, 1.0], [1.0, fifth, 1.0, 9.0]])
        torch.testing.assert_close(found, expected_weights, msg=rule)


def test_owners_that_cancel_elect_no_sign_and_leave_the_base(tmp_path: Path) -> None:
    base = tiny.save(tmp_path, {"w": torch.ones(2, 4)})
    members = [DeltaMember(t, delta(tmp_path / t, {3: v})) for t, v in (("a", 3.0), ("b", -1.0))]
    assert torch.equal(edited(base, stitch(base, members, "elect"), "w"), torch.ones(2, 4))


def weighed(folder: Path, member: DeltaMember, seed: int) -> DeltaMember:
    """The same member with random factors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for name in member.delta.names:
        info = sparse_delta(member).info(name)
        count = info.shape[0] + info.numel // info.shape[0]
        factors = (torch.rand(count, generator=generator) + 0.01).bfloat16()
        values, coordinates = (
            sparse_delta(member).values(name),
            sparse_delta(member).coordinates(name),
        )
        tensors.append(SparseTensor(name, info.shape, coordinates, values, factors))
    path = folder / f"{member.task}.weighed"
    write_sparse(path, tensors, kind="delta", metadata={})
    return DeltaMember(member.task, SparseFile.open(path))


@pytest.mark.parametrize("rule", [*RULES, 0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_rule_matches_the_slow_reference_for_any_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str | float, dtype: torch.dtype
) -> None:
    base = tiny.save(tmp_path / "base", tiny.base_tensors(dtype=dtype))
    members = [tiny.member(tmp_path, base, task, i, density=0.6) for i, task in enumerate("wxyz")]
    members[1:] = [weighed(tmp_path, member, i) for i, member in enumerate(members[1:])]
    for block in (1 << 19, 7):
        monkeypatch.setattr("restitch.merging.rules.stitch._BLOCK", block)
        if isinstance(rule, str):
            edits = stitch(base, members, rule)
        else:
            edits = get_method("weighted-stitch")(base, members, growth=rule)
        for name in base.names:
            assert torch.equal(edited(base, edits, name), slow(base, members, name, rule))


@pytest.mark.parametrize("rule", OVERLAPS)
def test_neither_the_order_of_members_nor_former_members_matter(tmp_path: Path, rule: str) -> None:
    base = tiny.save(tmp_path / "base", tiny.base_tensors())
    members = [tiny.member(tmp_path, base, task, i) for i, task in enumerate("abc")]
    patches = set()
    for order in itertools.permutations(members):
        write_patch(tmp_path / "p", base, stitch(base, order, rule), {})
        patches.add((tmp_path / "p").read_bytes())
    assert len(patches) == 1
    write_patch(tmp_path / "p", base, stitch(base, members[:1], rule), {})
    write_patch(tmp_path / "q", base, members[0].delta, {})
    assert (tmp_path / "p").read_bytes() == (tmp_path / "q").read_bytes()


@pytest.mark.parametrize("rule", OVERLAPS)
def test_a_weight_with_one_owner_is_the_finetuned_weight_bit_for_bit(
    tmp_path: Path, rule: str
) -> None:
    base = tiny.save(tmp_path, {"w": torch.full((2, 4), 0.1)})
    odd = {0: -0.0, 1: 1e-45, 2: 3.4e38, 6: 1 / 3}
    members = [
        DeltaMember("a", delta(tmp_path / "a", {**odd, 5: 2.0})),
        DeltaMember("b", delta(tmp_path / "b", {5: 1.0})),
    ]
    found = edited(base, stitch(base, members, rule), "w").view(-1).view(torch.int32)
    expected = torch.tensor(list(odd.values())).view(torch.int32)
    assert [int(found[c]) for c in odd] == expected.tolist()


def test_members_without_factors_have_equal_weights(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", tiny.base_tensors(dtype=torch.bfloat16))
    members = [tiny.member(tmp_path, base, task, i) for i, task in enumerate("ab")]
    mean, weighted = (stitch(base, members, rule) for rule in ("mean", "weighted"))
    for name in mean.names:
        assert torch.equal(edited(base, mean, name), edited(base, weighted, name))


def test_growth_goes_from_the_mean_to_the_sum(tmp_path: Path) -> None:
    base = tiny.save(tmp_path, {"w": torch.ones(2, 4)})
    members = [
        DeltaMember(t, delta(tmp_path / t, {3: v}))
        for t, v in zip("abcd", (3.0, 5.0, 1.0, 9.0), strict=True)
    ]
    found = []
    for growth in (0.0, 0.25, 0.5, 0.75, 1.0):
        edits = get_method("weighted-stitch")(base, members, growth=growth)
        found.append(float(edited(base, edits, "w")[0, 3]))
    # The owners move by 2, 4, 0 and 8: 3.5 on average, 14 together.
    expected = [1 + 3.5 * 4**growth for growth in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert found == pytest.approx(expected, rel=1e-6)


def test_only_growths_with_the_same_rounding_everywhere_are_allowed(tmp_path: Path) -> None:
    base = tiny.save(tmp_path, {"w": torch.ones(2, 4)})
    for growth in (0.3, -0.25, 1.25):
        with pytest.raises(BadInput, match="growth"):
            get_method("weighted-stitch")(base, [], growth=growth)
