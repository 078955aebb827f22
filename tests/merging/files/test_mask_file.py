"""The mask file: what is read is what was written, in the smallest encoding; nothing else is."""

import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from restitch.merging.errors import BadInput, Damage
from restitch.merging.files.mask_file import Bits, MaskFile, MaskWriter
from restitch.merging.files.sparse import SparseFile, SparseTensor, write_sparse
from tests.stress.hostile_masks import HostileMask, check_mask, masks

SIZES = {"a b": 5, "c": 20_000, "d": 64}


def patch_of(folder: Path, sizes: Mapping[str, int]) -> SparseFile:
    """A patch that keeps so many weights of each tensor, and leaves out some between them."""
    tensors = [
        SparseTensor(name, (2 * size,), 2 * torch.arange(size), torch.ones(size))
        for name, size in sizes.items()
    ]
    write_sparse(folder / "patch", tensors, kind="patch", metadata={})
    return SparseFile.open(folder / "patch")


def random_bits(size: int, share: float, seed: int = 0) -> Bits:
    return np.random.default_rng(seed).random(size) < share


def written(folder: Path, bits: Iterable[tuple[str, Bits]], metadata: Mapping[str, str]) -> Path:
    with MaskWriter(folder) as writer:
        for name, value in bits:
            writer.add(name, value)
        assert writer.finish(folder / "mask", metadata) == (folder / "mask").stat().st_size
    return folder / "mask"


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 400), st.floats(0, 1), st.integers(0, 9)), max_size=4))
def test_a_file_is_read_as_it_was_written(parts: list[tuple[int, float, int]]) -> None:
    bits = {f"t{i}": random_bits(*part) for i, part in enumerate(parts)}
    with TemporaryDirectory() as name:
        folder = Path(name)
        patch = patch_of(folder, {name: len(value) for name, value in bits.items()})
        file = MaskFile.open(written(folder, bits.items(), {"task": "x"}), patch)
        assert file.metadata == {"task": "x"}
        assert file.names == tuple(name for name, value in bits.items() if value.any())
        assert file.taken == sum(int(value.sum()) for value in bits.values())
        for name in file.names:
            assert np.array_equal(file.bits(name), bits[name])


@pytest.mark.parametrize(
    ("share", "code", "most"),
    [(0.0, "", 0.0), (0.02, "e5", 0.16), (0.3, "z", 0.9), (0.5, "b", 1.0), (1.0, "w", 0.0)],
)
def test_the_smallest_encoding_is_chosen(
    tmp_path: Path, share: float, code: str, most: float
) -> None:
    patch = patch_of(tmp_path, {"c": 80_000})
    path = written(tmp_path, [("c", random_bits(80_000, share))], {})
    with safe_open(path, framework="pt") as file:
        table = json.loads(file.metadata()["restitch.masks"])
        assert [row.split()[2] for row in table] == [code] * bool(code)
        assert file.get_tensor("masks").numel() <= most * 10_000
    assert MaskFile.open(path, patch).taken == int(random_bits(80_000, share).sum())


def good(folder: Path) -> tuple[SparseFile, Path]:
    bits = {name: random_bits(size, 0.3) for name, size in SIZES.items()}
    bits["d"] = random_bits(64, 0.02, 5) | (np.arange(64) == 3)
    return patch_of(folder, SIZES), written(folder, bits.items(), {})


def rows(change: Callable[[list[str]], object]) -> Callable[[dict[str, str]], None]:
    def apply(metadata: dict[str, str]) -> None:
        table = json.loads(metadata["restitch.masks"])
        change(table)
        metadata["restitch.masks"] = json.dumps(table)

    return apply


def field(number: int, value: str) -> Callable[[dict[str, str]], None]:
    """One word of the row of `c`, which is deflated."""

    def change(table: list[str]) -> None:
        words = table[1].split(" ", 4)
        words[number] = value
        table[1] = " ".join(words)

    return rows(change)


DAMAGES: dict[str, Callable[[dict[str, str]], object]] = {
    "no table": lambda m: m.pop("restitch.masks"),
    "table that is no list": lambda m: m.update({"restitch.masks": "{}"}),
    "table that is no JSON": lambda m: m.update({"restitch.masks": "["}),
    "a row less": rows(lambda t: t.pop()),
    "a row twice": rows(lambda t: t.append(t[-1])),
    "rows out of order": rows(lambda t: t.reverse()),
    "short row": rows(lambda t: t.__setitem__(0, "5 1")),
    "more bits than the patch keeps": field(0, "20001"),
    "more bits than there is memory": field(0, "9" * 18),
    "more taken than there are": field(1, "20001"),
    "nothing taken": field(1, "0"),
    "a negative number taken": field(1, "-1"),
    "another encoding": field(2, "b"),
    "no encoding": field(2, "q"),
    "another size": field(3, "7"),
    "no size": field(3, "x"),
    "another tensor": field(4, "cc"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_a_table_that_does_not_match_bytes_or_patch_is_damage(
    tmp_path: Path, damage: Callable[[dict[str, str]], object]
) -> None:
    patch, path = good(tmp_path)
    with safe_open(path, framework="pt") as file:
        metadata, section = file.metadata(), file.get_tensor("masks")
    damage(metadata)
    save_file({"masks": section}, tmp_path / "y", metadata)
    with pytest.raises(Damage, match="y is damaged"):
        MaskFile.open(tmp_path / "y", patch)


def test_a_mask_of_another_patch_is_damage(tmp_path: Path) -> None:
    _, path = good(tmp_path)
    with pytest.raises(Damage, match="of which the patch keeps 4"):
        MaskFile.open(path, patch_of(tmp_path, {**SIZES, "a b": 4}))


def test_other_files_are_bad_input(tmp_path: Path) -> None:
    patch, _ = good(tmp_path)
    with pytest.raises(BadInput, match="not a mask file"):
        MaskFile.open(patch.path, patch)


@pytest.mark.parametrize("fill", [b"\x00", b"\xff", b"\x03\x00", b"\x4b"])
def test_deflated_bits_that_were_changed_are_damage(tmp_path: Path, fill: bytes) -> None:
    patch, path = good(tmp_path)
    with safe_open(path, framework="pt") as file:
        metadata, section = file.metadata(), file.get_tensor("masks").numpy().tobytes()
    words = json.loads(metadata["restitch.masks"])[1].split()
    assert words[2] == "z"
    start, size = 1, int(words[3])
    changed = section[:start] + (fill * size)[:size] + section[start + size :]
    save_file({"masks": torch.tensor(list(changed), dtype=torch.uint8)}, path, metadata)
    file = MaskFile.open(path, patch)
    with pytest.raises(Damage, match=r"mask is damaged[^-]*found: +c: "):
        file.bits("c")
    assert file.bits("a b").any()


@settings(max_examples=60)
@given(masks())
def test_any_file_is_refused_or_read_as_a_slow_reader_reads_it(hostile: HostileMask) -> None:
    check_mask(hostile)


@pytest.mark.parametrize("size", [1 << 13, 1 << 16])
def test_a_stream_that_inflates_too_much_is_damage_and_costs_nothing(
    tmp_path: Path, size: int
) -> None:
    with MaskWriter(tmp_path) as writer:
        writer.finish(tmp_path / "mask", {"shared": "0" * 64, "scale": "0x1p+0"})
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    stream = deflate.compress(bytes(size << 10)) + deflate.flush()
    with safe_open(tmp_path / "mask", framework="pt") as file:
        metadata = file.metadata() | {"restitch.masks": json.dumps([f"64 1 z {len(stream)} a"])}
    save_file({"masks": torch.tensor(list(stream), dtype=torch.uint8)}, tmp_path / "x", metadata)
    given = HostileMask((tmp_path / "x").read_bytes(), {"a": 64})
    assert check_mask(given) == "Damage"  # this counts what is allocated, too


@pytest.mark.parametrize("wrong", ["order", "twice", "metadata"])
def test_a_writer_cannot_break_the_format(tmp_path: Path, wrong: str) -> None:
    one = np.ones(3, dtype=np.bool_)
    names = {"order": ("b", "a"), "twice": ("a", "a"), "metadata": ("a",)}[wrong]
    metadata = {"restitch.kind": "x"} if wrong == "metadata" else {}
    with pytest.raises(ValueError):
        written(tmp_path, [(name, one) for name in names], metadata)
    assert list(tmp_path.iterdir()) == []
