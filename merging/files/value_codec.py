"""A code for values in bfloat16: most of their high bytes take 3 bits.

The high byte of a value, its sign and most of its exponent, is one of few: the 7 most frequent ones
of a tensor have codes 0 to 6. Code 7 stands for any other byte, which follows as it is. Low bytes
stay as they are. The bytes are a function of the values alone, on every machine, and every bit
pattern comes back.

Layout for k values with m other high bytes: the 7 high bytes, most frequent first, of equals the
lower one first; k low bytes; the codes of groups of 4 as numbers of 12 bits, the first code lowest,
and the last group of 8 filled with zeros: the low 8 bits of each number, then the high 4 bits of
each two, the first one lowest; m high bytes.
"""

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.uint16]

_FREQUENT = 7
# Values per step, a multiple of 8: few enough for the cache.
_BLOCK = 1 << 16


def pack(values: Values) -> tuple[bytes, int]:
    """The coded bits of some values, and the number of their high bytes that are not frequent."""
    counts = np.zeros(256, dtype=np.int64)
    for start in range(0, len(values), _BLOCK):
        counts += np.bincount(values[start : start + _BLOCK] >> 8, minlength=256)
    frequent = np.argsort(-counts, kind="stable")[:_FREQUENT].astype(np.uint8)
    code_of = np.full(256, _FREQUENT, dtype=np.uint8)
    code_of[frequent] = np.arange(_FREQUENT)
    lows, highs, others = [], [], []
    for start in range(0, len(values), _BLOCK):
        bytes_ = (values[start : start + _BLOCK] >> 8).astype(np.uint8)
        codes = code_of.take(bytes_)
        others.append(bytes_[codes == _FREQUENT])
        groups = _grouped(codes)
        lows.append(groups.astype(np.uint8))
        nibbles = (groups >> 8).astype(np.uint8)
        highs.append(nibbles[0::2] | nibbles[1::2] << 4)
    parts = [frequent, values.astype(np.uint8), *lows, *highs, *others]
    return b"".join(part.tobytes() for part in parts), sum(map(len, others))


def packed_size(count: int, others: int) -> int:
    """The bytes of `count` coded values of which `others` have a high byte that is not frequent."""
    if not 0 <= others <= count:
        raise ValueError(f"{others} of {count} high bytes")
    return _FREQUENT + count + 3 * -(-count // 8) + others


def unpack(data: memoryview, count: int, others: int) -> Values:
    """The values that were coded; ValueError if `data` is not a valid code of so many."""
    if len(data) != packed_size(count, others):
        raise ValueError(f"{len(data)} bytes for {count} coded values")
    raw, eighths = np.frombuffer(data, dtype=np.uint8), -(-count // 8)
    frequent, low, rest = raw[:_FREQUENT], raw[_FREQUENT:][:count], raw[_FREQUENT + count :]
    lows, highs, other = rest[: 2 * eighths], rest[2 * eighths :][:eighths], rest[3 * eighths :]
    _check_padding(lows, highs, count)
    mark, table = _table(frequent)
    values = np.empty(count, dtype=np.uint16)
    done = 0
    for start in range(0, count, _BLOCK):
        block = values[start : start + _BLOCK]
        groups = _spread(highs[start // 8 : -(-(start + len(block)) // 8)])
        groups |= lows[start // 4 : start // 4 + len(groups)]
        high = table.take(groups).view(np.uint8)[: len(block)]
        places = np.flatnonzero(high == mark)
        if done + len(places) > others:
            raise ValueError(f"more than {others} other high bytes")
        high[places] = other[done : done + len(places)]
        done += len(places)
        block[:] = high
        block <<= 8
        block |= low[start : start + len(block)]
    if done != others:
        raise ValueError(f"{done} other high bytes, expected {others}")
    return values


def _grouped(codes: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Four codes per number, for an even number of groups."""
    filled = np.zeros(-(-len(codes) // 8) * 8, dtype=np.uint8)
    filled[: len(codes)] = codes
    wide = filled.view("<u4")
    # The codes of a word, 3 of 8 bits each, move together: first in pairs, then all four.
    pairs = wide & 0x00070007 | (wide & 0x07000700) >> 5
    groups: NDArray[np.uint16] = (pairs & 0x3F | pairs >> 10).astype(np.uint16)
    return groups


def _spread(highs: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Each nibble as the high 4 of the 12 bits of a number."""
    wide = highs.astype("<u2")
    wide |= wide << 4
    wide &= 0x0F0F
    groups = wide.view(np.uint8).astype(np.uint16)
    groups <<= 8
    return groups


def _table(frequent: NDArray[np.uint8]) -> tuple[int, NDArray[np.uint32]]:
    """A byte that stands for code 7, and the four high bytes of each number of 12 bits."""
    known = set(frequent.tolist())
    mark = next(byte for byte in range(_FREQUENT + 1) if byte not in known)
    byte_of = np.append(frequent, mark).astype(np.uint32)
    two = (byte_of | byte_of[:, None] << np.uint32(8)).reshape(-1)
    return mark, (two | two[:, None] << np.uint32(16)).reshape(-1)


def _check_padding(lows: NDArray[np.uint8], highs: NDArray[np.uint8], count: int) -> None:
    if count % 8:
        last = int(highs[-1]) << 8 & 0xF00 | int(lows[-2]), int(highs[-1]) >> 4 << 8 | int(lows[-1])
        if (last[1] << 12 | last[0]) >> 3 * (count % 8):
            raise ValueError("the padding of the codes is not zero")
