"""The factor file: golden bytes, round trips, and files that are damaged or made to harm."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from restitch.merging.digests import digest_bytes
from restitch.merging.errors import BadInput, Damage
from restitch.merging.files.delta import open_delta
from restitch.merging.files.factor_file import FactorFile, FactorTensor, write_factors
from restitch.merging.numerics.factors import Factors
from tests import tiny

LEFT = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
RIGHT = torch.tensor([[4.0, 0.0], [0.0, 0.5]])
MATRIX = FactorTensor("a b", (3, 2), Factors(LEFT, RIGHT, 0.5), torch.bfloat16)
CODES = FactorTensor("b", (3, 2), Factors(LEFT, RIGHT), torch.int8)
WHOLE = FactorTensor("é", (2,), torch.tensor([1.0, -2.0]), torch.bfloat16)


def write(path: Path, *tensors: FactorTensor) -> FactorFile:
    write_factors(path, tensors, metadata={"base": "B"})
    return FactorFile.open(path)


def test_the_bytes_of_the_format_are_fixed(tmp_path: Path) -> None:
    info = write_factors(tmp_path / "x", [MATRIX, CODES, WHOLE], metadata={"base": "B"})
    header = (
        b'{"__metadata__":{"base":"B","restitch.format":"1","restitch.kind":"factors",'
        b'"restitch.tensors":"[\\"BF16 3x2 2 0.5 a b\\",\\"I8 3x2 2 1.0 b\\",'
        b'\\"BF16 2 - 1.0 \xc3\xa9\\"]"},'
        b'"steps":{"dtype":"BF16","shape":[4],"data_offsets":[0,8]},'
        b'"values.BF16":{"dtype":"BF16","shape":[12],"data_offsets":[8,32]},'
        b'"codes":{"dtype":"I8","shape":[10],"data_offsets":[32,42]}}'
    )
    header += b" " * (-len(header) % 8)
    golden = (
        len(header).to_bytes(8, "little")
        + header
        + b"\x01<\x81<\x01=\x81;"  # steps: 1, 2, 4 and 0.5 over 127
        + b"\x80?\x00\x00\x00\x00\x00@\x00\x00\x00\x00"  # the left factor of `a b`
        + b"\x80@\x00\x00\x00\x00\x00?"  # its right one
        + b"\x80?\x00\xc0"  # é
        + b"\x7f\x00\x00\x7f\x00\x00\x7f\x00\x00\x7f"  # codes
    )
    assert (tmp_path / "x").read_bytes() == golden
    assert (info.bytes, info.digest, info.kept) == (len(golden), digest_bytes(golden), 22)


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    file = write(tmp_path / "x", MATRIX, CODES, WHOLE)
    assert file.names == ("a b", "b", "é")
    assert file.total == 22
    assert file.metadata == {"base": "B"}
    assert file.difference("a b").tolist() == [[2, 0], [0, 0.5], [0, 0]]
    assert torch.allclose(file.difference("b"), LEFT @ RIGHT, rtol=0.01)
    assert file.difference("é").tolist() == [1, -2]
    assert file.low_rank("é") is None
    opened = open_delta(tmp_path / "x")
    assert isinstance(opened, FactorFile)
    assert opened.content_digest() == file.content_digest()


def test_it_is_a_plain_safetensors_file(tmp_path: Path) -> None:
    write(tmp_path / "x", MATRIX, WHOLE)
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.get_tensor("values.BF16").tolist()[:6] == LEFT.reshape(-1).tolist()


def test_the_content_digest_knows_numbers_and_scales_but_not_the_metadata(tmp_path: Path) -> None:
    def digest(*tensors: FactorTensor, **metadata: str) -> str:
        write_factors(tmp_path / "x", tensors, metadata=metadata)
        return FactorFile.open(tmp_path / "x").content_digest()

    scaled = FactorTensor("a b", (3, 2), Factors(LEFT, RIGHT, 0.25), torch.bfloat16)
    other = FactorTensor("a b", (3, 2), Factors(LEFT, RIGHT + 1, 0.5), torch.bfloat16)
    assert digest(MATRIX) == digest(MATRIX, base="C")
    assert len({digest(MATRIX), digest(scaled), digest(other), digest(MATRIX, WHOLE)}) == 4


def test_tensors_of_rank_0_are_left_out_and_no_tensor_is_a_file(tmp_path: Path) -> None:
    nothing = FactorTensor(
        "a", (3, 2), Factors(torch.zeros(3, 0), torch.zeros(0, 2)), torch.float32
    )
    assert write(tmp_path / "x", nothing, WHOLE).names == ("é",)
    empty = write(tmp_path / "y")
    assert (empty.names, empty.total) == ((), 0)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8]),
    st.lists(st.integers(2, 6), min_size=2, max_size=4),
    st.integers(1, 4),
    st.integers(0, 2**31),
)
def test_any_matrix_survives_in_its_type(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: torch.dtype,
    shape: list[int],
    rank: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    sides = [torch.randn(s, generator=generator) for s in ((rows, rank), (rank, columns))]
    factors = Factors(sides[0], sides[1])
    path = tmp_path_factory.mktemp("f") / "x"
    found = write(path, FactorTensor("w", tuple(shape), factors, dtype)).low_rank("w")
    assert found is not None
    for one, other in zip(sides, (found.left, found.right), strict=True):
        if dtype == torch.int8:
            assert torch.allclose(one, other, atol=float(one.abs().max()) / 100)
        else:
            assert torch.equal(one.to(dtype), other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_applying_adds_the_task_vector_and_rounds_once(tmp_path: Path, dtype: torch.dtype) -> None:
    before = torch.tensor([[1.0, -0.0], [3.0, 4.0], [-0.0, 6.0]], dtype=dtype)
    after = before.clone()
    write(tmp_path / "x", MATRIX).apply("a b", after.view(-1))
    wanted = (before.double() + MATRIX_PRODUCT.double()).to(dtype)
    assert torch.equal(after, wanted)
    # Weights that do not change keep their bits: a negative zero stays one.
    assert torch.signbit(after[2, 0])


MATRIX_PRODUCT = 0.5 * LEFT @ RIGHT


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (FactorTensor("w", (3, 3), Factors(LEFT, RIGHT), torch.float32), "does not fit"),
        (FactorTensor("w", (6,), Factors(LEFT, RIGHT), torch.float32), "does not fit"),
        (FactorTensor("w", (3,), torch.zeros(2), torch.float32), "does not fit"),
        (FactorTensor("w", (2,), torch.zeros(2), torch.int8), "does not fit"),
        (FactorTensor("w", (3, 2), Factors(LEFT, RIGHT, float("nan")), torch.int8), "not fit"),
    ],
)
def test_a_tensor_that_does_not_fit_is_not_written(
    tmp_path: Path, tensor: FactorTensor, why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        write_factors(tmp_path / "x", [tensor], metadata={})
    assert not (tmp_path / "x").exists()


def test_names_must_be_in_order(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not in name order"):
        write_factors(tmp_path / "x", [WHOLE, MATRIX], metadata={})


def changed(path: Path, rows: list[str], **tensors: Tensor) -> None:
    """Write a file with another table, or with other sections."""
    with safe_open(path, "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() | {"restitch.tensors": json.dumps(rows)}
    save_file(found | tensors, path, metadata)


@pytest.mark.parametrize(
    "row",
    [
        "BF16 3x2 3 0.5 a b",  # more numbers than there are
        "BF16 3x2 1 0.5 a b",  # fewer
        "BF16 3x2 0 0.5 a b",
        "BF16 3x2 -2 0.5 a b",
        "BF16 3x2 2 nan a b",
        "BF16 3x2 2 0.50 a b",  # another text of the same number
        "BF16 3x2 2 a b",
        "BF16 10 2 0.5 a b",  # factors of a vector
        "I8 10 - 1.0 a b",
        "I64 3x2 2 0.5 a b",
        "BF16 9999999999x9999999999x9999999999 2 0.5 a b",
    ],
)
def test_a_table_that_does_not_fit_is_damage(tmp_path: Path, row: str) -> None:
    write(tmp_path / "x", MATRIX)
    changed(tmp_path / "x", [row])
    with pytest.raises(Damage, match="is damaged"):
        FactorFile.open(tmp_path / "x")


def test_numbers_that_are_not_finite_are_damage(tmp_path: Path) -> None:
    write(tmp_path / "x", MATRIX, WHOLE)
    values = torch.full((12,), float("inf"), dtype=torch.bfloat16)
    changed(tmp_path / "x", ["BF16 3x2 2 0.5 a b", "BF16 2 - 1.0 é"], **{"values.BF16": values})
    file = FactorFile.open(tmp_path / "x")
    for name in file.names:
        with pytest.raises(Damage, match="is damaged"):
            file.difference(name)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    member = tiny.member(tmp_path, tiny.save(tmp_path / "base", tiny.base_tensors()), "a", 0)
    with pytest.raises(BadInput, match="not a factor file"):
        FactorFile.open(member.delta.path)
