"""Values in 8 bits: what they are restored to, what they cost, and what is refused."""

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from restitch.merging.errors import BadInput, Damage
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.edits import edited
from restitch.merging.files.mask import Mask
from restitch.merging.files.quantized import STEP_DTYPE, Quantized, quantized
from restitch.merging.files.sparse import SparseFile, SparseTensor, write_sparse
from restitch.merging.methods.registry import get_method
from restitch.merging.rules.stitch import DeltaMember
from tests import tiny

BASE = torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]])
AT = torch.tensor([0, 2, 4])
# Steps of 1/64 in the first row and of 1/2 in the second.
FINETUNED = torch.tensor([1 + 127 / 64, 1 - 5 / 64, 2 - 63.5])
STORED = Quantized(
    torch.tensor([127, -5, -127], dtype=torch.int8),
    torch.tensor([1 / 64, 0.5]).bfloat16(),
    BASE.dtype,
)


def written(folder: Path, base: Checkpoint, values: Quantized = STORED) -> SparseFile:
    write_sparse(folder / "x", [SparseTensor("w", (2, 3), AT, values)], kind="delta", metadata={})
    return SparseFile.open(folder / "x", base)


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return tiny.save(tmp_path / "base", {"w": BASE})


def test_a_value_is_a_number_of_steps_from_the_base() -> None:
    found = quantized(AT, FINETUNED, BASE.view(-1), (2, 3))
    assert found.codes.tolist() == STORED.codes.tolist()
    assert found.steps.tolist() == STORED.steps.tolist()
    assert torch.equal(found.restored(AT, BASE.view(-1), (2, 3)), FINETUNED)


def test_a_row_without_a_difference_has_no_step() -> None:
    found = quantized(AT, BASE.view(-1)[AT], BASE.view(-1), (2, 3))
    assert (found.steps.tolist(), found.codes.tolist()) == ([0, 0], [0, 0, 0])
    assert torch.equal(found.restored(AT, BASE.view(-1), (2, 3)), BASE.view(-1)[AT])


def test_one_dimension_is_one_row() -> None:
    before, after = torch.zeros(4), torch.tensor([1.0, -1.0, 0.5])
    found = quantized(torch.tensor([0, 1, 3]), after, before, (4,))
    assert found.steps.numel() == 1
    assert found.codes.tolist() == [127, -127, 64]


@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-30, 1e-4, 1.0, 1e20]),
)
def test_the_error_of_a_value_is_bounded(
    rows: int, columns: int, dtype: torch.dtype, seed: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    before = (torch.randn(rows * columns, generator=generator) * scale).to(dtype)
    after = (before + torch.randn(rows * columns, generator=generator).to(dtype) * scale).to(dtype)
    at = torch.arange(rows * columns)[torch.rand(rows * columns, generator=generator) < 0.7]
    stored = quantized(at, after[at], before, (rows, columns))
    found = stored.restored(at, before, (rows, columns))
    assert found.dtype == dtype
    for place, (one, other) in enumerate(zip(found.tolist(), after[at].tolist(), strict=True)):
        row = int(at[place]) // columns
        apart = (after.double() - before.double())[at[at // columns == row]].abs().max().item()
        step = stored.steps[row].item()
        exact = Fraction(before[at[place]].item()) + int(stored.codes[place]) * Fraction(step)
        assert found[place] == slowly_rounded(exact, dtype)
        rounding = torch.finfo(dtype).eps * max(abs(one), abs(other))
        assert abs(one - other) <= step / 2 + apart / 250 + rounding


def slowly_rounded(value: Fraction, dtype: torch.dtype) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64).to(dtype)


def test_the_bytes_of_format_3_are_fixed(tmp_path: Path, base: Checkpoint) -> None:
    file = written(tmp_path, base)
    golden = (
        b"\x18\x01\x00\x00\x00\x00\x00\x00"
        b'{"__metadata__":{"restitch.format":"3","restitch.kind":"delta",'
        b'"restitch.tensors":"[\\"F32 2x3 3 b w\\"]"},'
        b'"steps":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},'
        b'"codes":{"dtype":"I8","shape":[3],"data_offsets":[4,7]},'
        b'"positions":{"dtype":"U8","shape":[1],"data_offsets":[7,8]}} '
        b"\x80<\x00?"  # steps
        b"\x7f\xfb\x81"  # codes
        b"\x15"  # positions
    )
    assert (tmp_path / "x").read_bytes() == golden
    assert file.is_quantized
    assert torch.equal(file.values("w"), FINETUNED)
    wanted = BASE.view(-1).clone()
    wanted[AT] = FINETUNED
    assert torch.equal(edited(base, file, "w"), wanted.view(2, 3))


def test_members_in_8_bits_are_merged_with_their_restored_values(
    tmp_path: Path, base: Checkpoint
) -> None:
    exact = tmp_path / "exact"
    write_sparse(exact, [SparseTensor("w", (2, 3), AT, FINETUNED)], kind="delta", metadata={})
    other = tiny.write_delta(
        tmp_path / "other",
        tiny.save(tmp_path / "finetuned", {"w": BASE + 1}),
        Mask.of({"w": torch.tensor([2, 3, 4])}),
    )
    for name in ("localize-and-stitch", "weighted-stitch"):
        merged = [
            edited(
                base, get_method(name)(base, [DeltaMember("a", one), DeltaMember("b", other)]), "w"
            )
            for one in (written(tmp_path, base), SparseFile.open(exact))
        ]
        assert torch.equal(*merged)


def test_values_in_8_bits_need_a_matching_base(tmp_path: Path, base: Checkpoint) -> None:
    written(tmp_path, base)
    assert SparseFile.open(tmp_path / "x").coordinates("w").tolist() == AT.tolist()
    with pytest.raises(ValueError, match="without its base"):
        SparseFile.open(tmp_path / "x").values("w")
    for tensors in ({"w": BASE.T.contiguous()}, {"v": BASE}):
        wrong = tiny.save(tmp_path / f"{[*tensors]}", tensors)
        with pytest.raises(BadInput, match="does not fit the base"):
            SparseFile.open(tmp_path / "x", wrong).values("w")


def test_negative_or_infinite_steps_are_damage(tmp_path: Path, base: Checkpoint) -> None:
    written(tmp_path, base)
    good = (tmp_path / "x").read_bytes()
    for bad in (b"\x80\xbf", b"\xc0\x7f", b"\x80\x7f"):  # -1, NaN, infinity
        (tmp_path / "x").write_bytes(good.replace(b"\x80<\x00?", bad + b"\x00?"))
        with pytest.raises(Damage, match="steps"):
            SparseFile.open(tmp_path / "x", base).values("w")


def test_tensors_that_do_not_match_are_not_written(tmp_path: Path) -> None:
    exact = SparseTensor("v", (2, 3), AT, FINETUNED)
    for tensors in (
        [exact, SparseTensor("w", (2, 3), AT, STORED)],
        [SparseTensor("w", (3, 2), AT, STORED)],
        [SparseTensor("w", (2, 3), AT, Quantized(STORED.codes, -STORED.steps, BASE.dtype))],
    ):
        with pytest.raises(ValueError):
            write_sparse(tmp_path / "x", tensors, kind="delta", metadata={})
    assert STORED.steps.dtype == STEP_DTYPE
