import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from restitch.merging.files import coordinate_codec as module
from restitch.merging.files.coordinate_codec import (
    Coordinates,
    decode,
    differing_positions,
    encode,
    encoded_size,
)


def coordinates(*values: int) -> Coordinates:
    return np.array(values, dtype=np.int64)


def chosen(numel: int, kept: int, seed: int = 0) -> Coordinates:
    generator = np.random.default_rng(seed)
    return np.sort(generator.choice(numel, kept, replace=False)).astype(np.int64)


@settings(max_examples=300)
@given(st.data())
def test_decoding_reverses_encoding(data: st.DataObject) -> None:
    numel = data.draw(st.integers(1, 3000))
    kept = data.draw(st.integers(1, numel))
    seed = data.draw(st.integers(0, 100))
    given_ = chosen(numel, kept, seed)
    if data.draw(st.booleans()):  # all at one end
        given_ = np.arange(kept, dtype=np.int64) + data.draw(st.sampled_from([0, numel - kept]))
    code, encoded = encode(given_, numel)
    assert len(encoded) == encoded_size(code, kept, numel)
    assert np.array_equal(decode(code, memoryview(encoded), kept, numel), given_)


@pytest.mark.parametrize("numel", [1 << 33, (1 << 40) + 7])
def test_tensors_of_more_than_32_bits_of_coordinates_work(numel: int) -> None:
    given_ = coordinates(0, 5, numel // 2, numel - 1)
    code, encoded = encode(given_, numel)
    assert len(encoded) < 40
    assert decode(code, memoryview(encoded), 4, numel).tolist() == given_.tolist()


def test_tensors_longer_than_a_block_are_decoded() -> None:
    for numel, kept in ((3_000_000, 150_000), (3_000_000, 5), (2_000_000, 1_900_000)):
        given_ = chosen(numel, kept)
        code, encoded = encode(given_, numel)
        assert np.array_equal(decode(code, memoryview(encoded), kept, numel), given_)


@pytest.mark.parametrize("density", [1e-5, 0.001, 0.01, 0.05, 0.2, 0.4])
def test_a_coordinate_costs_at_most_two_bits_more_than_its_information(density: float) -> None:
    numel = 200_000
    kept = max(1, int(density * numel))
    _, encoded = encode(chosen(numel, kept), numel)
    assert 8 * len(encoded) <= kept * (2 + math.log2(numel / kept)) + 8 * 6


def test_positions_never_cost_more_than_a_bitmap() -> None:
    for kept in range(1, 4097, 13):
        _, encoded = encode(chosen(4096, kept), 4096)
        assert len(encoded) <= 4096 // 8


@pytest.mark.parametrize(
    ("numel", "kept", "letter"), [(1000, 10, "e"), (1000, 400, "b"), (1000, 990, "c"), (9, 9, "w")]
)
def test_the_smallest_encoding_is_chosen(numel: int, kept: int, letter: str) -> None:
    assert encode(chosen(numel, kept), numel)[0][0] == letter


def test_the_bytes_are_those_of_the_layout() -> None:
    # n = 64, l = 3. Low two bits 3, 1, 3; third bits 0, 0, 1; high parts 0, 2, 7 in unary.
    by_hand = bytes([0b110111, 0b100, 0b00001001, 0b10])
    assert decode("e3", memoryview(by_hand), 3, 64).tolist() == [3, 17, 63]
    assert encode(coordinates(0, 33), 64) == ("e4", bytes([0x10, 0b001001]))
    assert encode(coordinates(0, 1, 2, 9), 10) == ("b", bytes([0b111, 0b10]))


@pytest.mark.parametrize(
    ("code", "data", "kept", "numel"),
    [
        ("e4", bytes([0x10, 0b001001, 0]), 2, 64),  # too long
        ("e4", bytes([0x10]), 2, 64),  # too short
        ("e4", bytes([0x10, 0b000001]), 2, 64),  # a coordinate is missing
        ("e4", bytes([0x10, 0b101001]), 2, 64),  # one too many
        ("e4", bytes([0x01, 0b000011]), 2, 64),  # falling
        ("e4", bytes([0x11, 0b000011]), 2, 64),  # the same twice
        ("e4", bytes([0x10, 0b1001001]), 2, 64),  # a bit behind the end
        ("e4", bytes([0xC0, 0b010001]), 2, 60),  # 60 of 60 elements
        ("b", bytes([0b111, 0b110]), 4, 10),
        ("b", bytes([0b111, 0b10000010]), 4, 10),
        ("w", b"", 3, 4),
        ("x", b"", 4, 4),
        ("e", b"", 4, 8),
        ("e-1", b"", 4, 8),
        ("e99", b"", 4, 8),
        ("e²", b"", 4, 8),
        ("c3", b"", 4, 4),
        ("e1", b"", 0, 4),
        ("e1", b"", 5, 4),
    ],
)
def test_bytes_that_encode_cannot_have_written_are_refused(
    code: str, data: bytes, kept: int, numel: int
) -> None:
    with pytest.raises(ValueError):
        decode(code, memoryview(data), kept, numel)


def test_order_is_checked_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("restitch.merging.files.coordinate_codec._BLOCK", 1)
    rising, twice = bytes([0b0100, 0, 0x80, 1]), bytes([0, 0, 0x80, 1])
    assert decode("e3", memoryview(rising), 2, 64).tolist() == [56, 57]
    with pytest.raises(ValueError):
        decode("e3", memoryview(twice), 2, 64)


@pytest.mark.parametrize("wrong", [[], [2, 1], [1, 1], [-1], [10]])
def test_wrong_coordinates_are_not_encoded(wrong: list[int]) -> None:
    with pytest.raises(ValueError):
        encode(coordinates(*wrong), 10)


@pytest.mark.parametrize("block", [3, 1 << 19])
@given(st.integers(0, 40), st.integers(0, 100))
def test_differing_positions_are_where_two_arrays_differ(block: int, count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    one, other = generator.integers(0, 2, (2, count), dtype=np.int16)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "_COMPARED", block)
        found = differing_positions(one, other)
    assert found.dtype == np.int64
    assert found.tolist() == np.flatnonzero(one != other).tolist()
