"""How sorted coordinates are written in bits: Elias-Fano, bitmap, complement or whole.

For k coordinates of a tensor with n elements Elias-Fano stores the low l bits of each
coordinate as bit planes and the rest in unary: about 2 + log2(n / k) bits per coordinate
at most, wherever they lie. The complement stores the coordinates that are left out in
the same way, a bitmap one bit per element, and a whole tensor nothing. `encode` takes
the smallest; a code such as `e6` together with k and n is all that `decode` needs.
Decoding checks order, range and count and raises ValueError.

Layout of Elias-Fano: for l as a sum of powers of two, largest first, a plane of that
many bits per coordinate, taken from the low end (little-endian, low bits of a byte
first, filled up to a byte); then the unary vector of k + (n - 1 >> l) bits in which bit
(coordinate >> l) + its index is set.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Coordinates = NDArray[np.int64]

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
        coordinates = _complement(coordinates, numel)
    return code, _encode_sorted(coordinates, numel, int(code[1:]))


def encoded_size(code: str, kept: int, numel: int) -> int:
    """How many bytes `kept` coordinates take in an encoding; ValueError for an unknown one."""
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
    """The coordinates that `encode` was given; ValueError where `data` cannot be right."""
    if len(data) != encoded_size(code, kept, numel):
        raise ValueError(f"{len(data)} bytes for {kept} coordinates in encoding {code!r}")
    raw = np.frombuffer(data, dtype=np.uint8)
    if code == "w":
        return np.arange(numel, dtype=np.int64)
    if code == "b":
        found = _set_bits(raw, numel)
    elif code[0] == "c":
        left_out = _decode_sorted(raw, numel - kept, numel, int(code[1:]))
        found = _complement(left_out, numel)
    else:
        found = _decode_sorted(raw, kept, numel, int(code[1:]))
    if len(found) != kept:
        raise ValueError(f"{len(found)} coordinates where {kept} are promised")
    return found


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
    parts = []
    for width, shift in _planes(low):
        plane = (coordinates >> shift) & ((1 << width) - 1)
        if width >= 8:
            parts.append(plane.astype(_BYTE_TYPES[width]).tobytes())
            continue
        per_byte = 8 // width
        padded = np.zeros(-(-stored // per_byte) * per_byte, dtype=np.uint8)
        padded[:stored] = plane
        packed = np.zeros(len(padded) // per_byte, dtype=np.uint8)
        for lane in range(per_byte):
            packed |= padded[lane::per_byte] << np.uint8(lane * width)
        parts.append(packed.tobytes())
    bits = np.zeros(stored + (numel - 1 >> low), dtype=np.uint8)
    bits[(coordinates >> low) + np.arange(stored)] = 1
    parts.append(np.packbits(bits, bitorder="little").tobytes())
    return b"".join(parts)


def _decode_sorted(raw: NDArray[np.uint8], stored: int, numel: int, low: int) -> Coordinates:
    offset = 0
    lows = np.zeros(stored, dtype=np.int64)
    for width, shift in _planes(low):
        size = -(-stored * width // 8)
        plane = raw[offset : offset + size]
        offset += size
        if width >= 8:
            values = np.frombuffer(plane, dtype=_BYTE_TYPES[width])
        else:
            per_byte = 8 // width
            lanes = np.empty((size, per_byte), dtype=np.uint8)
            for lane in range(per_byte):
                lanes[:, lane] = (plane >> np.uint8(lane * width)) & np.uint8((1 << width) - 1)
            values = lanes.reshape(-1)
            if values[stored:].any():
                raise ValueError("the filling of a plane is not zero")
            values = values[:stored]
        lows |= values.astype(np.int64) << shift
    found = _set_bits(raw[offset:], stored + (numel - 1 >> low))
    if len(found) != stored:
        raise ValueError(f"{len(found)} coordinates where {stored} are promised")
    found -= np.arange(stored)
    found <<= low
    found |= lows
    if found[-1] >= numel or np.any(found[1:] <= found[:-1]):
        raise ValueError("the coordinates are not increasing within the tensor")
    return found


def _bitmap(coordinates: Coordinates, numel: int) -> bytes:
    bits = np.zeros(numel, dtype=np.uint8)
    bits[coordinates] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def _set_bits(raw: NDArray[np.uint8], count: int) -> Coordinates:
    bits = np.unpackbits(raw, bitorder="little")
    if bits[count:].any():
        raise ValueError("the filling of a bit vector is not zero")
    return np.flatnonzero(bits[:count].view(np.bool_)).astype(np.int64, copy=False)


def _complement(coordinates: Coordinates, numel: int) -> Coordinates:
    rest = np.ones(numel, dtype=np.bool_)
    rest[coordinates] = False
    return np.flatnonzero(rest).astype(np.int64, copy=False)
