import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from restitch.merging.digests import digest_bytes
from restitch.merging.errors import BadInput, Damage
from restitch.merging.files.edits import Edits, edited
from restitch.merging.files.mask import Mask
from restitch.merging.files.sparse import (
    Cursor,
    SparseFile,
    SparseTensor,
    join_sparse,
    write_sparse,
    write_whole,
)
from restitch.merging.order import by_bytes
from tests import tiny

ONE = SparseTensor("a b", (4, 5), torch.tensor([0, 3, 19]), torch.tensor([1.0, -2.5, 0.0]))
TWO = SparseTensor("é", (), torch.tensor([0]), torch.tensor([7.0], dtype=torch.bfloat16))
_BITS = st.integers(0, 0xFFFF)
NONE = SparseTensor("b", (2,), torch.tensor([], dtype=torch.int64), torch.tensor([]))


def exact(tensor: SparseTensor) -> Tensor:
    assert isinstance(tensor.values, Tensor)
    return tensor.values


def test_the_bytes_of_format_1_are_fixed(tmp_path: Path) -> None:
    info = write_sparse(tmp_path / "x", [ONE, NONE, TWO], kind="delta", metadata={"model": "m"})
    golden = (
        b"H\x01\x00\x00\x00\x00\x00\x00"
        b'{"__metadata__":{"model":"m","restitch.format":"1","restitch.kind":"de'
        b'lta","restitch.tensors":"[\\"F32 4x5 3 e2 a b\\",\\"BF16  1 w \xc3\xa9\\"]"},"va'
        b'lues.F32":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},"values.BF'
        b'16":{"dtype":"BF16","shape":[1],"data_offsets":[12,14]},"positions":{"'
        b'dtype":"U8","shape":[2],"data_offsets":[14,16]}}'
        b"\x00\x00\x80?\x00\x00 \xc0\x00\x00\x00\x00"  # values.F32
        b"\xe0@"  # values.BF16
        b"<C"  # positions
    )
    assert (tmp_path / "x").read_bytes() == golden
    assert (info.bytes, info.digest, info.kept) == (len(golden), digest_bytes(golden), 4)


def test_the_digest_of_a_file_longer_than_a_block_is_that_of_its_bytes(tmp_path: Path) -> None:
    weights = torch.arange(3 << 18, dtype=torch.int32).view(torch.float32)
    checkpoint = tiny.save(tmp_path, {"w": weights, "x": weights[:1].clone()})
    info = write_whole(tmp_path / "x", checkpoint, ["w", "x"], kind="delta", metadata={})
    data = (tmp_path / "x").read_bytes()
    assert data.endswith(weights.numpy().tobytes() + weights[:1].numpy().tobytes())
    assert (info.bytes, info.digest) == (len(data), digest_bytes(data))


def weighed(tensor: SparseTensor, *factors: float) -> SparseTensor:
    return replace(tensor, factors=torch.tensor(factors, dtype=torch.bfloat16))


def test_the_bytes_of_format_4_are_fixed(tmp_path: Path) -> None:
    values = torch.full((16,), 1.0, dtype=torch.bfloat16)
    values[3] = float("nan")
    tensor = SparseTensor("c", (4, 5), torch.arange(16), values)
    info = write_sparse(tmp_path / "x", [ONE, tensor], kind="patch", metadata={}, packed=True)
    golden = (
        b"@\x01\x00\x00\x00\x00\x00\x00"
        b'{"__metadata__":{"restitch.format":"4","restitch.kind":"patch",'
        b'"restitch.tensors":"[\\"F32 4x5 3 e2 a b\\",\\"BF16:0 4x5 16 c2 c\\"]"},'
        b'"values.F32":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},'
        b'"positions":{"dtype":"U8","shape":[4],"data_offsets":[12,16]},'
        b'"packed":{"dtype":"U8","shape":[29],"data_offsets":[16,45]}}    '
        b"\x00\x00\x80?\x00\x00 \xc0\x00\x00\x00\x00"  # values.F32
        b"<C\xe4\xf0"  # positions
        b"?\x7f\x00\x01\x02\x03\x04"  # packed: the frequent high bytes,
        b"\x80\x80\x80\xc0\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80"  # the low bytes,
        b"\x00\x00\x00\x00\x02\x00"  # and the codes, of which the fourth is 1
    )
    assert (tmp_path / "x").read_bytes() == golden
    assert info.digest == digest_bytes(golden)


PACKED_TENSOR = SparseTensor(
    "b", (8, 8), torch.arange(0, 64, 2), torch.ones(32, dtype=torch.bfloat16)
)


@given(st.data())
def test_packed_values_keep_every_bit_and_join_with_others(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("packed")
    bits = st.one_of(st.sampled_from([0x3F80, 0xBF81, 0x7FC1, 0xFF80, 0x8000, 1]), _BITS)
    tensors = []
    for name in data.draw(st.sets(st.sampled_from(["a", "b", "é"]))):
        kept = np.array(data.draw(st.lists(bits, max_size=40)), dtype=np.uint16)
        dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16]))
        values = torch.from_numpy(kept.view(np.int16)).view(dtype)
        tensors.append(SparseTensor(name, (41,), torch.arange(len(kept)), values))
    tensors.sort(key=lambda tensor: by_bytes(tensor.name))
    options: dict[str, Any] = {"kind": "patch", "metadata": {}}
    plain = write_sparse(folder / "plain", tensors, **options)
    packed = write_sparse(folder / "x", tensors, **options, packed=True)
    assert packed.bytes <= plain.bytes + 64  # the section's name in the header
    file = SparseFile.open(folder / "x")
    for tensor in tensors:
        if tensor.name in file:
            found = file.values(tensor.name).view(torch.int16)
            assert torch.equal(found, exact(tensor).view(torch.int16))
    assert write_sparse(folder / "again", file.tensors(), **options) == plain
    for tensor in tensors:
        write_sparse(folder / tensor.name, [tensor], **options, packed=True)
    parts = [SparseFile.open(folder / tensor.name) for tensor in tensors]
    assert join_sparse(folder / "joined", parts, **options) == packed


@pytest.mark.parametrize("found", ["BF16:1", "F16:0", "BF16:33", "BF16:", "BF16"])
def test_a_table_that_does_not_fit_packed_values_is_damage(tmp_path: Path, found: str) -> None:
    write_sparse(tmp_path / "x", [PACKED_TENSOR], kind="patch", metadata={}, packed=True)
    with safe_open(tmp_path / "x", framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata["restitch.tensors"] = metadata["restitch.tensors"].replace("BF16:0", found)
    save_file(tensors, tmp_path / "y", metadata)
    with pytest.raises(Damage, match="y is damaged"):
        SparseFile.open(tmp_path / "y")


def test_packed_values_that_were_changed_are_damage(tmp_path: Path) -> None:
    write_sparse(tmp_path / "x", [PACKED_TENSOR], kind="patch", metadata={}, packed=True)
    data = bytearray((tmp_path / "x").read_bytes())
    data[-1] |= 0xE0  # the code of a byte that does not follow
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(Damage, match="b: more than 0 other high bytes"):
        SparseFile.open(tmp_path / "x").values("b")


WEIGHED = [weighed(ONE, 1, 2, 3, 4, 1, 1, 1, 1, 0.5), NONE, weighed(TWO, 8, 1)]


def test_the_bytes_of_format_2_are_fixed(tmp_path: Path) -> None:
    write_sparse(tmp_path / "x", WEIGHED, kind="delta", metadata={})
    golden = (
        b"\x80\x01\x00\x00\x00\x00\x00\x00"
        b'{"__metadata__":{"restitch.format":"2","restitch.kind":"delta"'
        b',"restitch.tensors":"[\\"F32 4x5 3 e2 a b\\",\\"BF16  1 w \xc3\xa9\\"]"}'
        b',"values.F32":{"dtype":"F32","shape":[3],"data_offsets":[0,12]'
        b'},"values.BF16":{"dtype":"BF16","shape":[1],"data_offsets":[12'
        b',14]},"factors":{"dtype":"BF16","shape":[11],"data_offsets":[1'
        b'4,36]},"positions":{"dtype":"U8","shape":[2],"data_offsets":[3'
        b"6,38]}}     "
        b"\x00\x00\x80?\x00\x00 \xc0\x00\x00\x00\x00"  # values.F32
        b"\xe0@"  # values.BF16
        b"\x80?\x00@@@\x80@\x80?\x80?\x80?\x80?\x00?\x00A\x80?"  # factors
        b"<C"  # positions
    )
    assert (tmp_path / "x").read_bytes() == golden


def test_factors_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_sparse(tmp_path / "x", WEIGHED, kind="delta", metadata={})
    file = SparseFile.open(tmp_path / "x")
    found = file.factors("a b")
    assert found is not None
    assert [part.tolist() for part in found] == [[1, 2, 3, 4], [1, 1, 1, 1, 0.5]]
    assert torch.equal(file.values("a b"), exact(ONE))
    assert torch.equal(file.coordinates("a b"), ONE.coordinates)
    write_sparse(tmp_path / "y", [ONE], kind="delta", metadata={})
    assert SparseFile.open(tmp_path / "y").factors("a b") is None


def test_factors_that_are_not_positive_are_damage(tmp_path: Path) -> None:
    write_sparse(tmp_path / "x", WEIGHED, kind="delta", metadata={})
    good = (tmp_path / "x").read_bytes()
    for bad in (b"\x00\x00", b"\x80\xbf", b"\xc0\x7f", b"\x80\x7f"):  # 0, -1, NaN, infinity
        (tmp_path / "x").write_bytes(good.replace(b"\x00@@@", b"\x00@" + bad))
        with pytest.raises(Damage, match="a b"):
            SparseFile.open(tmp_path / "x").factors("a b")


def test_factors_that_do_not_fit_the_tensors_are_damage(tmp_path: Path) -> None:
    write_sparse(tmp_path / "x", WEIGHED, kind="delta", metadata={})
    with safe_open(tmp_path / "x", framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for factors in (tensors["factors"][1:], tensors["factors"].double(), None):
        changed = {**tensors, "factors": factors}
        save_file({k: v for k, v in changed.items() if v is not None}, tmp_path / "y", metadata)
        with pytest.raises(Damage, match="y is damaged"):
            SparseFile.open(tmp_path / "y")
    save_file(tensors, tmp_path / "z", metadata | {"restitch.format": "1"})
    with pytest.raises(Damage, match="z is damaged"):
        SparseFile.open(tmp_path / "z")


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_sparse(tmp_path / "x", [ONE, NONE, TWO], kind="patch", metadata={"model": "m"})
    file = SparseFile.open(tmp_path / "x")
    assert (file.kind, file.metadata, file.names, file.total) == (
        "patch",
        {"model": "m"},
        ("a b", "é"),
        4,
    )
    for tensor in (ONE, TWO):
        info = file.info(tensor.name)
        assert (info.dtype, info.shape) == (tensor.values.dtype, tensor.shape)
        assert info.kept == tensor.coordinates.numel()
        assert torch.equal(file.coordinates(tensor.name), tensor.coordinates)
        assert torch.equal(file.values(tensor.name), exact(tensor))
    mask = Mask.of({tensor.name: tensor.coordinates for tensor in (ONE, TWO)})
    assert file.mask().digest() == mask.digest()


def test_values_keep_every_bit(tmp_path: Path) -> None:
    values = torch.tensor([-0.0, torch.inf, 1e-45, 3.4e38])
    tensor = SparseTensor("a", (9,), torch.tensor([1, 2, 4, 8]), values)
    write_sparse(tmp_path / "x", [tensor], kind="delta", metadata={})
    found = SparseFile.open(tmp_path / "x").values("a")
    assert torch.equal(found.view(torch.int32), values.view(torch.int32))


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    write_sparse(tmp_path / "x", [ONE, TWO], kind="delta", metadata={})
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert set(file.keys()) == {"positions", "values.F32", "values.BF16"}
        assert torch.equal(file.get_tensor("values.F32"), exact(ONE))


def test_a_file_without_tensors_is_valid(tmp_path: Path) -> None:
    write_sparse(tmp_path / "x", [NONE], kind="delta", metadata={})
    file = SparseFile.open(tmp_path / "x")
    assert (file.names, file.total) == ((), 0)


def test_a_sparse_file_is_edits(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "b", {"a b": torch.full((4, 5), 9.0), "c": torch.ones(1)})
    write_sparse(tmp_path / "x", [ONE], kind="patch", metadata={})
    file = SparseFile.open(tmp_path / "x")
    assert isinstance(file, Edits)
    expected = torch.full((20,), 9.0)
    expected[ONE.coordinates] = exact(ONE)
    assert torch.equal(edited(base, file, "a b"), expected.view(4, 5))
    assert torch.equal(edited(base, file, "c"), torch.ones(1))
    with pytest.raises(ValueError):
        file.apply("a b", torch.ones(19))


def test_a_cursor_returns_each_coordinate_in_its_range() -> None:
    blocks = iter([np.array([3, 10]), np.array([11, 29]), np.array([30])])
    cursor = Cursor(blocks, torch.arange(5.0))
    taken = [
        [(int(c), float(v)) for piece in cursor.advance(10) for c, v in zip(*piece, strict=True)]
        for _ in range(4)
    ]
    assert taken == [[(3, 0)], [(0, 1), (1, 2)], [(9, 3)], [(0, 4)]]


def test_one_percent_of_an_encoder_costs_5_2_bytes_per_weight(tmp_path: Path) -> None:
    # The localizable tensors of MiniLM: 10.6 M coordinates in 96 tensors with long names.
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(6):
        front = f"encoder.layer.{layer}."
        for name in ("query", "key", "value"):
            shapes[f"{front}attention.self.{name}.weight"] = (384, 384)
            shapes[f"{front}attention.self.{name}.bias"] = (384,)
        for name, shape in (
            ("attention.output.dense", (384, 384)),
            ("intermediate.dense", (1536, 384)),
            ("output.dense", (384, 1536)),
        ):
            shapes[f"{front}{name}.weight"] = shape
            shapes[f"{front}{name}.bias"] = shape[:1]
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"{front}{name}.weight"] = shapes[f"{front}{name}.bias"] = (384,)
    assert len(shapes) == 96
    generator = torch.Generator().manual_seed(0)

    def kept(name: str) -> SparseTensor:
        numel = torch.Size(shapes[name]).numel()
        chosen = torch.rand(numel, generator=generator) < 0.01
        coordinates = chosen.nonzero().view(-1)
        return SparseTensor(name, shapes[name], coordinates, torch.ones(len(coordinates)))

    info = write_sparse(tmp_path / "x", map(kept, sorted(shapes)), kind="delta", metadata={})
    assert info.kept > 100_000
    assert info.bytes / info.kept <= 5.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.3, 0.5, 0.9, 0.97, 0.999, 1.0])
def test_a_dense_file_is_not_larger_than_the_tensor_whole(
    tmp_path: Path, density: float, dtype: torch.dtype
) -> None:
    numel = 20_000
    generator = torch.Generator().manual_seed(0)
    coordinates = (torch.rand(numel, generator=generator) < density).nonzero().view(-1)
    tensor = SparseTensor(
        "layer.weight", (100, 200), coordinates, torch.zeros(len(coordinates), dtype=dtype)
    )
    info = write_sparse(tmp_path / "x", [tensor], kind="patch", metadata={})
    whole = len(save({"layer.weight": torch.zeros(100, 200, dtype=dtype)}))
    assert info.bytes <= whole + 200  # the table and the names of the sections


@pytest.mark.parametrize(
    "wrong",
    ["order", "values", "twice", "integers", "metadata", "kind", "factors", "zero", "mixed"],
)
def test_a_writer_cannot_break_the_format_and_leaves_no_file(tmp_path: Path, wrong: str) -> None:
    tensors = {
        "order": [TWO, ONE],
        "twice": [ONE, ONE],
        "values": [SparseTensor("a", (4,), torch.tensor([0, 1]), torch.tensor([1.0]))],
        "factors": [weighed(ONE, 1, 2, 3, 4)],
        "zero": [weighed(ONE, 1, 2, 3, 4, 1, 1, 0, 1, 1)],
        "mixed": [WEIGHED[0], TWO],
        "integers": [SparseTensor("a", (4,), torch.tensor([0]), torch.tensor([1]))],
    }.get(wrong, [ONE])
    metadata = {"restitch.kind": "x"} if wrong == "metadata" else {}
    kind = "mask" if wrong == "kind" else "delta"
    with pytest.raises(ValueError):
        write_sparse(tmp_path / "x", tensors, kind=kind, metadata=metadata)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"old")

    def failing() -> Iterator[SparseTensor]:
        yield ONE
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_sparse(tmp_path / "x", failing(), kind="delta", metadata={})
    assert (tmp_path / "x").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_other_safetensors_and_newer_formats_are_bad_input(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(BadInput, match="not a sparse file"):
        SparseFile.open(tmp_path / "x.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "y", {"restitch.format": "3"})
    with pytest.raises(BadInput, match="format 3"):
        SparseFile.open(tmp_path / "y")


def rows(change: Callable[[list[str]], object]) -> Callable[[dict[str, str]], None]:
    def apply(metadata: dict[str, str]) -> None:
        table = json.loads(metadata["restitch.tensors"])
        change(table)
        metadata["restitch.tensors"] = json.dumps(table)

    return apply


DAMAGES: dict[str, Callable[[dict[str, str]], object]] = {
    "no table": lambda m: m.pop("restitch.tensors"),
    "table that is no JSON": lambda m: m.update({"restitch.tensors": "["}),
    "table that is no list": lambda m: m.update({"restitch.tensors": "{}"}),
    "a row less": rows(lambda t: t.pop()),
    "a row twice": rows(lambda t: t.append(t[-1])),
    "rows out of order": rows(lambda t: t.reverse()),
    "another count": rows(lambda t: t.__setitem__(0, t[0].replace(" 3 ", " 2 "))),
    "negative count": rows(lambda t: t.__setitem__(0, t[0].replace(" 3 ", " -3 "))),
    "smaller shape": rows(lambda t: t.__setitem__(0, t[0].replace("4x5", "1x1"))),
    "huge shape": rows(lambda t: t.__setitem__(0, t[0].replace("4x5", "9999999999x9999999999"))),
    "another type": rows(lambda t: t.__setitem__(0, t[0].replace("F32", "F64"))),
    "no type": rows(lambda t: t.__setitem__(0, t[0].replace("F32", "F31"))),
    "short row": rows(lambda t: t.__setitem__(0, "F32 4x5")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_a_table_that_does_not_fit_its_sections_is_damage(
    tmp_path: Path, damage: Callable[[dict[str, str]], object]
) -> None:
    write_sparse(tmp_path / "x", [ONE, TWO], kind="delta", metadata={})
    with safe_open(tmp_path / "x", framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    damage(metadata)
    save_file(tensors, tmp_path / "y", metadata)
    with pytest.raises(Damage, match="y is damaged"):
        SparseFile.open(tmp_path / "y")


def test_coordinates_that_were_changed_are_damage(tmp_path: Path) -> None:
    write_sparse(tmp_path / "x", [ONE], kind="delta", metadata={})
    data = bytearray((tmp_path / "x").read_bytes())
    data[-1] ^= 0xFF
    (tmp_path / "x").write_bytes(data)
    file = SparseFile.open(tmp_path / "x")
    with pytest.raises(Damage, match="a b"):
        file.coordinates("a b")


_KEPT = st.dictionaries(st.integers(0, 11), st.sampled_from([0.0, -0.0, 1.5, -2.0]), max_size=12)
_TYPES = st.sampled_from([torch.float32, torch.bfloat16])


@given(_KEPT, _KEPT, _KEPT, _TYPES, _TYPES)
def test_a_tensors_digest_is_that_of_its_edit_whatever_else_is_in_the_file(
    tmp_path_factory: pytest.TempPathFactory,
    first: dict[int, float],
    second: dict[int, float],
    other: dict[int, float],
    first_type: torch.dtype,
    second_type: torch.dtype,
) -> None:
    folder = tmp_path_factory.mktemp("digests")

    def tensor(name: str, kept: dict[int, float], dtype: torch.dtype) -> SparseTensor:
        places = sorted(kept)
        values = torch.tensor([kept[place] for place in places], dtype=dtype)
        return SparseTensor(name, (3, 4), torch.tensor(places, dtype=torch.int64), values)

    def written(number: int, *tensors: SparseTensor) -> SparseFile:
        write_sparse(folder / f"{number}", tensors, kind="patch", metadata={"n": f"{number}"})
        return SparseFile.open(folder / f"{number}")

    files = (
        written(1, tensor("b", first, first_type)),
        written(2, tensor("a", other, first_type), tensor("b", second, second_type)),
    )
    digests = [file.tensor_digest("b") for file in files if "b" in file]
    # As text: 0.0 and -0.0 are different edits.
    edits = [(str(sorted(first.items())), first_type), (str(sorted(second.items())), second_type)]
    if len(digests) == 2:
        assert (digests[0] == digests[1]) == (edits[0] == edits[1])


@given(st.data())
def test_a_whole_file_has_the_bytes_of_a_sparse_file_that_keeps_everything(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("whole")
    shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
    types = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
    drawn = data.draw(st.dictionaries(st.sampled_from("abcé"), st.tuples(shapes, types)))
    values = {name: torch.randn(shape).to(dtype) for name, (shape, dtype) in drawn.items()}
    checkpoint = tiny.save(folder, {**values, "other": torch.ones(2)})
    tensors = [
        SparseTensor(name, values[name].shape, torch.arange(flat.numel()), flat)
        for name in sorted(values, key=by_bytes)
        for flat in [values[name].reshape(-1)]
    ]
    expected = write_sparse(folder / "x", tensors, kind="delta", metadata={"model": "m"})
    info = write_whole(folder / "y", checkpoint, values, kind="delta", metadata={"model": "m"})
    assert info == expected
    assert (folder / "y").read_bytes() == (folder / "x").read_bytes()


_WEIGHTS = st.integers(1, 3).flatmap(
    lambda size: st.tuples(
        st.just(size),
        st.sets(st.integers(0, size * 4 - 1)),
        st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    )
)


@settings(max_examples=30)
@given(st.data())
def test_parts_join_to_the_bytes_of_one_file_however_the_tensors_were_split(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    drawn = data.draw(st.dictionaries(st.sampled_from(["a", "a b", "b", "é", "z"]), _WEIGHTS))
    weighed_too = data.draw(st.booleans())
    tensors = {}
    for name, (rows, kept, dtype) in sorted(drawn.items(), key=lambda item: by_bytes(item[0])):
        places = torch.tensor(sorted(kept), dtype=torch.int64)
        tensors[name] = SparseTensor(name, (rows, 4), places, torch.randn(len(kept)).to(dtype))
        if weighed_too:
            tensors[name] = weighed(tensors[name], *range(1, rows + 5))
    part_of = {name: data.draw(st.integers(0, 2)) for name in tensors}
    for number in range(3):
        own = [tensors[name] for name in tensors if part_of[name] == number]
        write_sparse(folder / f"{number}", own, kind="patch", metadata={"part": str(number)})
    parts = [SparseFile.open(folder / f"{number}") for number in (2, 0, 1)]
    joined = join_sparse(folder / "joined", parts, kind="patch", metadata={"a": "b"})
    whole = write_sparse(folder / "w", tensors.values(), kind="patch", metadata={"a": "b"})
    assert joined == whole
    assert (folder / "joined").read_bytes() == (folder / "w").read_bytes()


def test_parts_with_a_common_tensor_do_not_join(tmp_path: Path) -> None:
    write_sparse(tmp_path / "x", [ONE], kind="patch", metadata={})
    part = SparseFile.open(tmp_path / "x")
    with pytest.raises(ValueError, match="a b"):
        join_sparse(tmp_path / "y", [part, part], kind="patch", metadata={})
    assert not (tmp_path / "y").exists()
