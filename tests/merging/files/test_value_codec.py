import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from restitch.merging.files import value_codec
from restitch.merging.files.value_codec import pack, packed_size, unpack

# One, two, minus one, NaN, infinity, minus zero and the smallest number, which is subnormal.
SPECIAL = [0x3F80, 0x4000, 0xBF80, 0x7FC1, 0x7F80, 0x8000, 0x0001]


def slow(values: np.ndarray) -> bytes:
    """The layout, bit by bit."""
    highs = [int(value) >> 8 for value in values]
    frequent = sorted(range(256), key=lambda byte: (-highs.count(byte), byte))[:7]
    codes = [frequent.index(byte) if byte in frequent else 7 for byte in highs]
    codes += [0] * (-len(codes) % 8)
    groups = [
        sum(code << 3 * i for i, code in enumerate(codes[at : at + 4]))
        for at in range(0, len(codes), 4)
    ]
    return bytes(
        [
            *frequent,
            *(int(value) & 255 for value in values),
            *(group & 255 for group in groups),
            *(
                one >> 8 | other >> 8 << 4
                for one, other in zip(groups[::2], groups[1::2], strict=True)
            ),
            *(byte for byte in highs if byte not in frequent),
        ]
    )


def test_the_bytes_of_the_code_are_fixed() -> None:
    values = np.array([0x3F01, 0x3F02, 0xBE03], dtype=np.uint16)
    assert pack(values) == (
        b"\x3f\xbe\x00\x01\x02\x03\x04"  # frequent high bytes
        b"\x01\x02\x03"  # low bytes
        b"\x40\x00"  # codes 0, 0 and 1, and padding
        b"\x00",
        0,
    )


@given(
    arrays.arrays(
        np.uint16,
        st.integers(0, 70),
        elements=st.one_of(st.sampled_from(SPECIAL), st.integers(0, 0xFFFF)),
    )
)
def test_every_bit_pattern_comes_back_from_the_documented_layout(values: np.ndarray) -> None:
    data, others = pack(values)
    assert data == slow(values)
    assert len(data) == packed_size(len(values), others)
    assert np.array_equal(unpack(memoryview(data), len(values), others), values)


@pytest.mark.parametrize("count", [16, 17, 24, 31, 32, 40])
def test_blocks_give_the_same_bytes(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(count).integers(0, 1 << 16, count).astype(np.uint16)
    values[::2] = 0x3F80
    monkeypatch.setattr(value_codec, "_BLOCK", 16)
    data, others = pack(values)
    assert data == slow(values)
    assert np.array_equal(unpack(memoryview(data), count, others), values)


def test_a_damaged_code_is_refused() -> None:
    values = np.array([*range(0, 0x900, 0x100), 0x3F80], dtype=np.uint16)
    data, others = pack(values)
    assert others == 3
    for bad, count, other in ((data[:-1], 10, 3), (data, 9, 3), (data, 10, 2), (data, 10, 11)):
        with pytest.raises(ValueError, match="bytes"):
            unpack(memoryview(bad), count, other)
    fewer, padded = bytearray(data), bytearray(data)
    fewer[7 + 10 + 2] &= 0xC0  # the codes of the last values
    padded[-4] |= 0x80  # the last nibble of the codes
    with pytest.raises(ValueError, match="expected 3"):
        unpack(memoryview(fewer), 10, 3)
    with pytest.raises(ValueError, match="padding"):
        unpack(memoryview(padded), 10, 3)
    swapped = bytearray(data)
    swapped[7 + 10] |= 0x07
    with pytest.raises(ValueError, match="more than 3"):
        unpack(memoryview(swapped), 10, 3)
