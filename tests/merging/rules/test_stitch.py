import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.edits import edited
from restitch.merging.files.sparse import SparseFile, SparseTensor, write_sparse
from restitch.merging.numerics.rounding import round_once
from restitch.merging.rules.stitch import (
    DeltaMember,
    sparse_delta,
    split_names,
    stitch,
    write_patch,
)
from tests import tiny


def delta(path: Path, values: dict[int, float], dtype: torch.dtype = torch.float32) -> SparseFile:
    coordinates = torch.tensor(sorted(values))
    kept = torch.tensor([values[int(c)] for c in coordinates], dtype=torch.float64).to(dtype)
    tensor = SparseTensor("w", (2, 4), coordinates, kept)
    write_sparse(path, [tensor], kind="delta", metadata={})
    return SparseFile.open(path)


def slow_stitch(base: Checkpoint, members: list[DeltaMember], name: str) -> Tensor:
    """The reference: coordinate by coordinate."""
    ordered = sorted(members, key=lambda member: member.task.encode())
    flat = base.tensor(name).clone().view(-1)
    owned: dict[int, list[Tensor]] = {}
    for member in ordered:
        if name in member.delta:
            pairs = zip(
                sparse_delta(member).coordinates(name),
                sparse_delta(member).values(name),
                strict=True,
            )
            for coordinate, value in pairs:
                owned.setdefault(int(coordinate), []).append(value)
    for coordinate, values in owned.items():
        if len(values) == 1:
            flat[coordinate] = round_once(values[0].view(1), flat.dtype)[0]
        else:
            total = 0.0
            for value in values:
                total += float(value)
            mean = torch.tensor([total / len(values)], dtype=torch.float64)
            flat[coordinate] = round_once(mean, flat.dtype)[0]
    return flat.view(base.info(name).shape)


def test_a_case_by_hand(tmp_path: Path) -> None:
    base = tiny.save(tmp_path, {"w": torch.arange(8.0).view(2, 4), "other": torch.ones(1)})
    members = [
        DeltaMember("b", delta(tmp_path / "b", {1: 10.0, 2: 30.0, 7: 2.0})),
        DeltaMember("a", delta(tmp_path / "a", {1: 20.0, 3: -1.0, 7: 3.0})),
        DeltaMember("c", delta(tmp_path / "c", {7: 7.0})),
    ]
    edits = stitch(base, members)
    assert edits.names == ("w",)
    # 1: mean of 10 and 20; 2 and 3: one owner; 7: mean of 2, 3 and 7; the rest: base.
    expected = torch.tensor([[0.0, 15, 30, -1], [4, 5, 6, 4]])
    assert torch.equal(edited(base, edits, "w"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16, torch.float64])
def test_stitching_matches_the_slow_reference(
    tmp_path: Path, dtype: torch.dtype, other: torch.dtype
) -> None:
    base = tiny.save(tmp_path / "base", tiny.base_tensors(dtype=dtype))
    members = [tiny.member(tmp_path, base, task, i, dtype=other) for i, task in enumerate("xyzw")]
    edits = stitch(base, members)
    for name in base.names:
        found = edited(base, edits, name)
        assert found.dtype == base.info(name).dtype
        assert torch.equal(found, slow_stitch(base, members, name))


def test_tensors_of_many_blocks_with_every_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("restitch.merging.rules.stitch._BLOCK", 100_003)
    numel = 600_000
    generator = torch.Generator().manual_seed(0)
    gap = torch.arange(numel)
    chosen = {
        "elias": torch.rand(numel, generator=generator) < 0.03,
        "bitmap": (torch.rand(numel, generator=generator) < 0.9) & ((gap < 1e5) | (gap > 4e5)),
        "complement": torch.rand(numel, generator=generator) < 0.99,
        "whole": torch.ones(numel, dtype=torch.bool),
        "far": (gap == 7) | (gap == numel - 1),
    }
    base = tiny.save(tmp_path, {"w": torch.zeros(numel, dtype=torch.bfloat16)})
    members, total, owners = [], torch.zeros(numel, dtype=torch.float64), torch.zeros(numel)
    for name, mask in sorted(chosen.items()):
        coordinates = mask.nonzero().view(-1)
        values = torch.randn(len(coordinates), generator=generator).bfloat16()
        tensor = SparseTensor("w", (numel,), coordinates, values)
        write_sparse(tmp_path / name, [tensor], kind="delta", metadata={})
        members.append(DeltaMember(name, SparseFile.open(tmp_path / name)))
        total[coordinates] += values.double()
        owners[coordinates] += 1
    found = edited(base, stitch(base, members), "w")
    assert torch.equal(found, round_once(total / owners, torch.bfloat16))


def test_a_sum_does_not_depend_on_other_coordinates(tmp_path: Path) -> None:
    # In float32 1e8 + 1 - 1e8 is 0; in float64 the mean is exactly 1/3, rounded once.
    base = tiny.save(tmp_path, {"w": torch.zeros(2, 4)})
    values = {"a": 1e8, "b": 1.0, "c": -1e8}
    members = [DeltaMember(t, delta(tmp_path / t, {5: v})) for t, v in values.items()]
    found = edited(base, stitch(base, members), "w")[1, 1]
    assert float(found) == float(torch.tensor(1 / 3))


def test_a_weight_with_one_owner_is_the_finetuned_weight_bit_for_bit(tmp_path: Path) -> None:
    base = tiny.save(tmp_path, {"w": torch.zeros(2, 4)})
    odd = {0: -0.0, 1: 1e-45, 2: 3.4e38, 6: 1 / 3}
    one = DeltaMember("a", delta(tmp_path / "a", odd))
    two = DeltaMember("b", delta(tmp_path / "b", {5: 1.0}))
    for edits in (stitch(base, [one]), stitch(base, [two, one])):
        found = edited(base, edits, "w").view(-1).view(torch.int32)
        assert [int(found[c]) for c in odd] == list(
            torch.tensor(list(odd.values())).view(torch.int32)
        )


def test_a_wider_value_with_one_owner_is_rounded_once(tmp_path: Path) -> None:
    base = tiny.save(tmp_path, {"w": torch.zeros(2, 4, dtype=torch.bfloat16)})
    just_above_the_middle = 1 + 2.0**-8 + 2.0**-40
    file = delta(tmp_path / "a", {5: just_above_the_middle}, torch.float64)
    assert float(edited(base, stitch(base, [DeltaMember("a", file)]), "w")[1, 1]) == 1 + 2.0**-7


def test_more_members_than_a_byte_counts(tmp_path: Path) -> None:
    base = tiny.save(tmp_path, {"w": torch.zeros(2, 4)})
    files = [delta(tmp_path / f"{value}", {3: float(value)}) for value in range(3)]
    members = [DeltaMember(f"task{i:03d}", files[i % 3]) for i in range(300)]
    assert float(edited(base, stitch(base, members), "w")[0, 3]) == 1.0


def test_shared_values_are_summed_in_the_order_of_the_tasks(tmp_path: Path) -> None:
    base = tiny.save(tmp_path, {"w": torch.zeros(2, 4, dtype=torch.float64)})
    values = {"B": 1e16, "a": 1.0, "b": -1e16}  # (1e16 + 1) - 1e16 is 0, other orders give 1
    members = [
        DeltaMember(task, delta(tmp_path / task, {5: value}, torch.float64))
        for task, value in values.items()
    ]
    for order in itertools.permutations(members):
        assert float(edited(base, stitch(base, order), "w")[1, 1]) == 0


def test_no_members_give_the_base(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "b", tiny.base_tensors())
    edits = stitch(base, [])
    assert edits.names == ()
    info = write_patch(tmp_path / "p", base, edits, {})
    assert info.kept == 0


def test_a_patch_holds_the_coordinates_whose_bytes_differ(tmp_path: Path) -> None:
    weights = torch.tensor([[1.0, 0.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]])
    base = tiny.save(tmp_path, {"w": weights})
    # 0: the base's own value; 1: -0 differs from 0 in its bytes; 4 and 5: other values.
    edits = stitch(
        base, [DeltaMember("a", delta(tmp_path / "a", {0: 1.0, 1: -0.0, 4: 9.0, 5: 8.0}))]
    )
    info = write_patch(tmp_path / "p", base, edits, {"recipe": "r"})
    patch = SparseFile.open(tmp_path / "p")
    assert (info.kept, patch.kind, patch.metadata) == (3, "patch", {"recipe": "r"})
    assert patch.coordinates("w").tolist() == [1, 4, 5]
    assert (
        edited(base, patch, "w").view(torch.int32).equal(edited(base, edits, "w").view(torch.int32))
    )


def test_a_patch_is_of_the_base_s_type(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "b", tiny.base_tensors(dtype=torch.bfloat16))
    edits = stitch(base, [tiny.member(tmp_path, base, "a", 0, dtype=torch.float32)])
    write_patch(tmp_path / "p", base, edits, {})
    patch = SparseFile.open(tmp_path / "p")
    assert {patch.info(name).dtype for name in patch.names} == {torch.bfloat16}


def test_the_same_merged_model_has_the_same_patch_however_it_was_made(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "b", tiny.base_tensors())
    edits = stitch(base, [tiny.member(tmp_path, base, t, i) for i, t in enumerate("ab")])
    write_patch(tmp_path / "p", base, edits, {})
    write_patch(tmp_path / "q", base, SparseFile.open(tmp_path / "p"), {})
    assert (tmp_path / "p").read_bytes() == (tmp_path / "q").read_bytes()


def test_a_delta_that_does_not_fit_the_base_lists_why(tmp_path: Path) -> None:
    file = delta(tmp_path / "a", {1: 1.0})
    for tensors in ({"v": torch.zeros(2, 4)}, {"w": torch.zeros(4, 2)}):
        base = tiny.save(tmp_path / "b", tensors)
        with pytest.raises(BadInput, match="w: ") as caught:
            stitch(base, [DeltaMember("mnist", file)])
        assert "mnist" in str(caught.value)


def test_patches_and_repeated_tasks_are_refused(tmp_path: Path) -> None:
    base = tiny.save(tmp_path, {"w": torch.zeros(2, 4)})
    file = delta(tmp_path / "a", {1: 1.0})
    write_patch(tmp_path / "p", base, stitch(base, [DeltaMember("a", file)]), {})
    with pytest.raises(BadInput):
        stitch(base, [DeltaMember("a", SparseFile.open(tmp_path / "p"))])
    with pytest.raises(ValueError):
        stitch(base, [DeltaMember("a", file), DeltaMember("a", file)])
    with pytest.raises(BadInput, match="overlap"):
        stitch(base, [DeltaMember("a", file)], overlap="median")


def test_tensors_are_split_in_their_order_by_their_bytes_in_the_base(tmp_path: Path) -> None:
    sizes = {"a": 2, "b": 3, "c": 9, "d": 1, "e": 1}
    base = tiny.save(tmp_path, {name: torch.zeros(size) for name, size in sizes.items()})
    assert split_names(base, sizes, 20) == (("a", "b"), ("c",), ("d", "e"))
    assert split_names(base, sizes, 1) == tuple((name,) for name in sizes)
    assert split_names(base, sizes, 10**9) == (tuple(sizes),)
    assert split_names(base, [], 20) == ((),)
