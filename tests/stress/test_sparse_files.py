"""Hostile deltas and patches are refused, or read as a slow reader reads them."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from restitch.merging.errors import Damage
from restitch.merging.files.coordinate_codec import encode
from restitch.merging.files.sparse import SparseFile, SparseTensor, write_sparse
from tests.stress.hostile_files import (
    check_positions,
    check_sparse,
    decode_slowly,
    positions,
    sparse_files,
)


@settings(max_examples=150)
@given(sparse_files())
def test_any_file_is_refused_or_read_as_a_slow_reader_reads_it(data: bytes) -> None:
    check_sparse(data)


@settings(max_examples=200)
@given(positions())
def test_any_bytes_are_refused_or_decoded_as_by_a_slow_reader(
    given: tuple[str, bytes, int, int],
) -> None:
    check_positions(given)


@pytest.mark.parametrize("chosen", [[0], [0, 3, 4, 90], [*range(60)], [*range(99)], [*range(100)]])
def test_the_slow_reader_reverses_encode(chosen: list[int]) -> None:
    code, data = encode(torch.tensor(chosen).numpy(), 100)
    assert decode_slowly(code, data, len(chosen), 100) == chosen


def rewritten(path: Path, shape: str, code: str) -> None:
    """Change shape and code in the table of a file with one tensor."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    (row,) = json.loads(header["__metadata__"]["restitch.tensors"])
    dtype, _, kept, _, name = row.split(" ")
    header["__metadata__"]["restitch.tensors"] = json.dumps(
        [f"{dtype} {shape} {kept} {code} {name}"]
    )
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    ("shape", "code"),
    [
        ("9223372036854775808", "e62"),  # one more than a coordinate can be
        ("4294967296x4294967296", "e62"),
        ("9999999999999999999x9999999999999999999", "b"),
        ("1000000000000", "b"),
        ("1000000000000", "c3"),
        ("1000000000000", "w"),
    ],
)
def test_a_tensor_of_any_size_costs_nothing(tmp_path: Path, shape: str, code: str) -> None:
    path = tmp_path / "x"
    tensor = SparseTensor("a", (4,), torch.tensor([1]), torch.ones(1))
    write_sparse(path, [tensor], kind="delta", metadata={})
    rewritten(path, shape, code)
    assert check_sparse(path.read_bytes()) == "Damage"  # with a check of its memory
    with pytest.raises(Damage, match="x is damaged"):
        SparseFile.open(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_keep_their_bits(tmp_path: Path, value: float) -> None:
    # A member needs finite weights; the file format itself is lossless.
    tensor = SparseTensor("a", (4,), torch.tensor([1]), torch.tensor([value]))
    write_sparse(tmp_path / "x", [tensor], kind="delta", metadata={})
    found = SparseFile.open(tmp_path / "x").values("a")
    assert found.view(torch.int32).equal(torch.tensor([value]).view(torch.int32))
