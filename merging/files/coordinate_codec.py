"""Encodings of sorted coordinates: Elias-Fano, bitmap, complement or whole tensor.

For k coordinates of a tensor with n elements, Elias-Fano stores the low l bits of each
coordinate as bit planes and the rest in unary: at most about 2 + log2(n / k) bits per
coordinate. The complement stores the omitted coordinates in the same way, a bitmap one
bit per element, and a whole tensor nothing. `encode` chooses the smallest encoding;
`decode` needs its code (such as `e6`), k and n. Decoding checks order, range and count
and raises ValueError.

Layout of Elias-Fano: write l as a sum of powers of two, largest first. Each is the width
of a plane, which holds that many bits per coordinate from the low end (little-endian, low
bits of a byte first, padded to a byte). The unary vector of k + (n - 1 >> l) bits follows,
in which the bit (coordinate >> l) + index of the coordinate is set.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Coordinates = NDArray[np.int64]

# Bytes of a bit vector per step: few enough for the cache, and enough that two threads seldom
# wait for each other between calls.
_BLOCK = 1 << 16
_COMPARED = 1 << 19
_NOWHERE = np.empty(0, dtype=np.int64)
_INDICES = np.arange(8 * _BLOCK, dtype=np.int64)
_BYTE_TYPES = {8: "<u1", 16: "<u2", 32: "<u4"}


def encode(coordinates: Coordinates, numel: int) -> tuple[str, bytes]:
    """The code of the smallest encoding and its bytes.

    Args:
        coordinates: sorted, distinct, in [0, numel); at least one.
        numel: elements of the tensor.
    """
    kept = len(coordinates)
    if kept < 1 or coordinates[0] < 0 or coordinates[-1] >= numel:
        raise ValueError(f"{kept} coordinates do not fit a tensor of {numel} elements")
    if np.any(coordinates[1:] <= coordinates[:-1]):
        raise ValueError("the coordinates are not sorted and distinct")
    code = _smallest(kept, numel)
    if code == "w":
        return code, b""
    if code == "b":
        return code, _bitmap(coordinates, numel)
    if code[0] == "c":
        coordinates = np.concatenate(list(_complement_blocks(coordinates, numel)))
    return code, _encode_sorted(coordinates, numel, int(code[1:]))


def encoded_size(code: str, kept: int, numel: int) -> int:
    """The number of bytes of `kept` coordinates in an encoding; ValueError if it is unknown."""
    if not 0 < kept <= numel:
        raise ValueError(f"{kept} of {numel} coordinates")
    if code == "w" and kept == numel:
        return 0
    if code == "b":
        return -(-numel // 8)
    if code[:1] in ("e", "c") and code[1:].isascii() and code[1:].isdigit() and len(code) < 4:
        low = int(code[1:])
        stored = kept if code[0] == "e" else numel - kept
        if low < 63 and stored:
            return _sorted_size(stored, numel, low)
    raise ValueError(f"no encoding {code!r} of {kept} of {numel} coordinates")


def decode(code: str, data: memoryview, kept: int, numel: int) -> Coordinates:
    """The coordinates that were encoded; ValueError if `data` is not a valid encoding."""
    return joined(decode_blocks(code, data, kept, numel), kept)


def joined(blocks: Iterable[Coordinates], count: int) -> Coordinates:
    """The `count` coordinates of some blocks as one array."""
    coordinates = np.empty(count, dtype=np.int64)
    done = 0
    for block in blocks:
        coordinates[done : done + len(block)] = block
        done += len(block)
    return coordinates


def decode_blocks(code: str, data: memoryview, kept: int, numel: int) -> Iterator[Coordinates]:
    """The coordinates in order, in blocks that fit a cache; ValueError as `decode`."""
    if len(data) != encoded_size(code, kept, numel):
        raise ValueError(f"{len(data)} bytes for {kept} coordinates in encoding {code!r}")
    raw = np.frombuffer(data, dtype=np.uint8)
    if code == "w":
        blocks = _ranges(numel)
    elif code == "b":
        blocks = _set_bits(raw, numel)
    elif code[0] == "c":
        omitted = numel - kept
        encoded = _sorted_blocks(raw, omitted, numel, int(code[1:]))
        blocks = _complement_blocks(joined(encoded, omitted), numel)
    else:
        blocks = _sorted_blocks(raw, kept, numel, int(code[1:]))
    count = 0
    for block in blocks:
        count += len(block)
        if count > kept:
            break
        if len(block):
            yield block
    if count != kept:
        raise ValueError(f"{count} or more coordinates, expected {kept}")


def true_positions(mask: NDArray[np.bool_]) -> Coordinates:
    """`np.flatnonzero` of a mask, several times faster if few elements are true."""
    whole = len(mask) // 8 * 8
    words = mask[:whole].view(np.uint64)
    # On sparse masks numpy branches per element and mispredicts; the words that are not zero
    # are dense enough for its loop without branches.
    nonzero = np.flatnonzero(words != 0)
    inside = np.flatnonzero(words[nonzero].view(np.bool_))
    positions: Coordinates = nonzero[inside >> 3]
    positions <<= 3
    inside &= 7
    positions |= inside
    if whole < len(mask):
        positions = np.concatenate([positions, np.flatnonzero(mask[whole:]) + whole])
    return positions


def differing_positions(one: NDArray[Any], other: NDArray[Any]) -> Coordinates:
    """The positions at which two flat arrays of the same length differ, in order."""
    parts = [
        true_positions(one[start : start + _COMPARED] != other[start : start + _COMPARED]) + start
        for start in range(0, len(one), _COMPARED)
    ]
    return np.concatenate([_NOWHERE, *parts])


def _smallest(kept: int, numel: int) -> str:
    if kept == numel:
        return "w"
    sizes = [(-(-numel // 8), "b")]
    for letter, stored in (("e", kept), ("c", numel - kept)):
        guess = max((numel // stored).bit_length() - 1, 0)
        lows = (guess, guess + 1, max(guess - 1, 0))
        sizes.extend((_sorted_size(stored, numel, low), f"{letter}{low}") for low in lows)
    return min(sizes, key=lambda item: item[0])[1]  # the first of equals


def _planes(low: int) -> Iterator[tuple[int, int]]:
    """Width and lowest bit of each plane."""
    shift = 0
    for width in (32, 16, 8, 4, 2, 1):
        if low & width:
            yield width, shift
            shift += width


def _sorted_size(stored: int, numel: int, low: int) -> int:
    planes = sum(-(-stored * width // 8) for width, _ in _planes(low))
    return planes + -(-(stored + (numel - 1 >> low)) // 8)


def _encode_sorted(coordinates: Coordinates, numel: int, low: int) -> bytes:
    stored = len(coordinates)
    parts = [_encode_plane(coordinates, width, shift) for width, shift in _planes(low)]
    unary = np.zeros(-(-(stored + (numel - 1 >> low)) // 8), dtype=np.uint8)
    for start in range(0, stored, 8 * _BLOCK):
        places = coordinates[start : start + 8 * _BLOCK] >> low
        places += np.arange(start, start + len(places))
        first, end = int(places[0]) // 8, int(places[-1]) // 8 + 1
        bits = np.zeros(8 * (end - first), dtype=np.uint8)
        bits[places - 8 * first] = 1
        unary[first:end] |= np.packbits(bits, bitorder="little")
    return b"".join([*parts, unary.tobytes()])


def _encode_plane(coordinates: Coordinates, width: int, shift: int) -> bytes:
    if width >= 8:
        return ((coordinates >> shift) & ((1 << width) - 1)).astype(_BYTE_TYPES[width]).tobytes()
    per_byte = 8 // width
    packed = np.zeros(-(-len(coordinates) // per_byte), dtype=np.uint8)
    for lane in range(per_byte):
        numbers = (coordinates[lane::per_byte] >> shift).astype(np.uint8)
        numbers &= (1 << width) - 1
        packed[: len(numbers)] |= numbers << np.uint8(lane * width)
    return packed.tobytes()


def _sorted_blocks(
    raw: NDArray[np.uint8], stored: int, numel: int, low: int
) -> Iterator[Coordinates]:
    planes = []
    for width, shift in _planes(low):
        size = -(-stored * width // 8)
        planes.append((raw[:size], width, shift))
        raw = raw[size:]
        if stored * width % 8 and planes[-1][0][-1] >> stored * width % 8:
            raise ValueError("the padding of a plane is not zero")
    done, last = 0, -1
    for bits in _set_bits(raw, stored + (numel - 1 >> low)):
        count = len(bits)
        if done + count > stored:
            raise ValueError(f"more than {stored} coordinates")
        if not count:
            continue
        bits -= _INDICES[:count]
        bits -= done
        if low:
            bits <<= low
            bits |= _lows(planes, low, done, done + count)
        if bits[0] <= last or bits[-1] >= numel or np.any(bits[1:] <= bits[:-1]):
            raise ValueError("the coordinates are not increasing within the tensor")
        done, last = done + count, int(bits[-1])
        yield bits
    if done != stored:
        raise ValueError(f"{done} coordinates, expected {stored}")


def _lows(
    planes: Sequence[tuple[NDArray[np.uint8], int, int]], low: int, begin: int, end: int
) -> NDArray[Any]:
    """The low bits of the coordinates with indices `begin` to `end`."""
    dtype = np.uint8 if low <= 8 else np.uint16 if low <= 16 else np.int64
    lows: NDArray[Any] | None = None
    for plane, width, shift in planes:
        if width >= 8:
            numbers = np.frombuffer(plane, dtype=_BYTE_TYPES[width])[begin:end]
        else:
            per_byte = 8 // width
            first = begin // per_byte
            spread = _SPREAD[width](plane[first : -(-end // per_byte)])
            numbers = spread[begin - first * per_byte :][: end - begin]
        part = numbers.astype(dtype, copy=False)
        lows = part if lows is None else np.bitwise_or(lows, np.left_shift(part, shift))
    assert lows is not None
    return lows


def _spread_1(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.unpackbits(packed, bitorder="little")


def _spread_2(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    # All lanes of a word at once: 0x000000ab becomes 0x0a0b in nibbles, then in pairs.
    wide = packed.astype("<u4")
    wide |= wide << 12
    wide &= 0x000F000F
    wide |= wide << 6
    wide &= 0x03030303
    return wide.view(np.uint8)


def _spread_4(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    wide = packed.astype("<u2")
    wide |= wide << 4
    wide &= 0x0F0F
    return wide.view(np.uint8)


_SPREAD = {1: _spread_1, 2: _spread_2, 4: _spread_4}


def _bitmap(coordinates: Coordinates, numel: int) -> bytes:
    bits = np.zeros(numel, dtype=np.uint8)
    bits[coordinates] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def _set_bits(raw: NDArray[np.uint8], count: int) -> Iterator[Coordinates]:
    """Positions of the set bits among the first `count`, by block; the padding must be zero."""
    if count % 8 and raw[-1] >> count % 8:
        raise ValueError("the padding of a bit vector is not zero")
    for start in range(0, len(raw), _BLOCK):
        bits = np.unpackbits(raw[start : start + _BLOCK], bitorder="little")
        positions = np.flatnonzero(bits.view(np.bool_))
        positions += 8 * start
        yield positions


def _ranges(numel: int) -> Iterator[Coordinates]:
    for start in range(0, numel, 8 * _BLOCK):
        yield np.arange(start, min(start + 8 * _BLOCK, numel), dtype=np.int64)


def _complement_blocks(coordinates: Coordinates, numel: int) -> Iterator[Coordinates]:
    for start in range(0, numel, 8 * _BLOCK):
        stop = min(start + 8 * _BLOCK, numel)
        first, end = np.searchsorted(coordinates, (start, stop))
        rest = np.ones(stop - start, dtype=np.bool_)
        rest[coordinates[first:end] - start] = False
        positions = np.flatnonzero(rest)
        positions += start
        yield positions
