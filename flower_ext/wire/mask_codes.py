r"""Codes for masks: the positions of ``count`` ones among ``size`` places, in bytes.

Bits for each one, at density p (H is the entropy of a coin, ``H(p)/p`` the least that
any code of independent places can take):

======  ===========================================  =========================
code    what it holds                                good for
======  ===========================================  =========================
bitmap  a bit a place: 1/p                           p above about 0.4
int32   a position each: 32                          nothing else smaller
varint  the gap to the last, 7 bits a byte: 8 or so  ones in clusters
rice    the gap, Rice coded: within 5% of H(p)/p     independent places
======  ===========================================  =========================

Gaps of independent places are geometric, for which Rice's code (Rice and Plaut 1971;
Golomb 1966) is nearly an entropy code. Its unary and its binary halves are kept in two
streams here, so that all of them are packed and unpacked at once: no range coder is
within reach of that speed, and its gain would be 0.2% of a payload of float32 values.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flower_ext.core.errors import refuse

Positions = npt.NDArray[np.int64]
Buffer = bytes | memoryview
_Bytes = npt.NDArray[np.uint8]

#: Places are below this: the largest array that can be encoded.
MAX_SIZE = 2**31 - 1
_LONGEST_VARINT = 5


@dataclass(frozen=True)
class MaskCode:
    """One code.

    Parameters
    ----------
    length : callable
        ``(positions, size) -> bytes`` of the code, found without encoding.
    encode : callable
        ``(positions, size) -> bytes``.
    decode : callable
        ``(data, count, size) -> positions``; raises ``ValueError`` unless it is the
        code of ``count <= size`` increasing positions below ``size``. Data that is
        longer than that can be is refused unread: what is allocated depends on ``size``
        and not on what somebody sent.
    """

    length: Callable[[Positions, int], int]
    encode: Callable[[Positions, int], bytes]
    decode: Callable[[Buffer, int, int], Positions]


def smallest(positions: Positions, size: int) -> str:
    """Return the name of the code that is the shortest for a mask.

    Parameters
    ----------
    positions : ndarray of int64
        Increasing.
    size : int
        Places, at most :data:`MAX_SIZE`.
    """
    if size > MAX_SIZE:
        refuse("size", size, f"<= {MAX_SIZE}", "divide the array")
    lengths = {name: code.length(positions, size) for name, code in MASK_CODES.items()}
    return min(lengths, key=lengths.__getitem__)


def entropy_bytes(count: int, size: int) -> float:
    """Return the entropy of ``size`` independent places at density count/size."""
    p = count / size if size else 0.0
    if p in (0.0, 1.0):
        return 0.0
    return float(-size * (p * np.log2(p) + (1 - p) * np.log2(1 - p)) / 8)


def _gaps(positions: Positions) -> Positions:
    """Count the zeros before each one."""
    gaps = np.diff(positions, prepend=-1)
    gaps -= 1
    return gaps


def _positions(gaps: Positions, size: int) -> Positions:
    if len(gaps) and gaps.max() >= size:
        raise ValueError("a position is out of range")
    gaps += 1
    positions = np.cumsum(gaps)
    positions -= 1
    return _in_range(positions, size)


def _in_range(positions: Positions, size: int) -> Positions:
    if len(positions) and positions[-1] >= size:
        raise ValueError("a position is out of range")
    return positions


def _of_length(data: Buffer, length: int) -> _Bytes:
    if len(data) != length:
        raise ValueError(f"a mask of {len(data)} bytes must have {length}")
    return np.frombuffer(data, np.uint8)


def _at_most(data: _Bytes, length: int) -> None:
    if len(data) > length:
        raise ValueError(f"{len(data)} bytes of a mask, must be at most {length}")


def _unpack(data: _Bytes, bits: int) -> _Bytes:
    """Return the first bits; those that fill the last byte must be zeros."""
    unpacked = np.unpackbits(data)
    if unpacked[bits:].any():
        raise ValueError("bits behind the end of a mask are set")
    return unpacked[:bits]


# bitmap ---------------------------------------------------------------------------


def _encode_bitmap(positions: Positions, size: int) -> bytes:
    bits = np.zeros(size, np.uint8)
    bits[positions] = 1
    return np.packbits(bits).tobytes()


def _decode_bitmap(data: Buffer, count: int, size: int) -> Positions:
    bits = _unpack(_of_length(data, (size + 7) // 8), size)
    return _counted(np.flatnonzero(bits.view(np.bool_)), count)


def _counted(positions: Positions, count: int) -> Positions:
    if len(positions) != count:
        raise ValueError(f"a mask of {len(positions)} ones must have {count}")
    return positions


# int32 ----------------------------------------------------------------------------


def _encode_int32(positions: Positions, size: int) -> bytes:
    return positions.astype("<u4").tobytes()


def _decode_int32(data: Buffer, count: int, size: int) -> Positions:
    positions = _of_length(data, 4 * count).view("<u4").astype(np.int64)
    if np.any(positions[1:] <= positions[:-1]):
        raise ValueError("positions do not increase")
    return _in_range(positions, size)


# varint ---------------------------------------------------------------------------


def _varint_lengths(gaps: Positions) -> Positions:
    lengths = np.ones(len(gaps), np.int64)
    for power in (7, 14, 21, 28):
        lengths += gaps >= 1 << power
    return lengths


def _encode_varint(positions: Positions, size: int) -> bytes:
    gaps = _gaps(positions)
    lengths = _varint_lengths(gaps)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    data = np.zeros(int(lengths.sum()), np.uint8)
    for i in range(int(lengths.max(initial=0))):
        here = lengths > i
        more = (lengths[here] > i + 1).astype(np.int64) << 7
        data[starts[here] + i] = ((gaps[here] >> (7 * i)) & 127) | more
    return data.tobytes()


def _decode_varint(data: Buffer, count: int, size: int) -> Positions:
    raw = np.frombuffer(data, np.uint8)
    _at_most(raw, _LONGEST_VARINT * count)
    ends = np.flatnonzero(raw < 128)
    _counted(ends, count)
    if len(raw) != (ends[-1] + 1 if count else 0):
        raise ValueError("the last gap is cut off")
    starts = np.concatenate([np.zeros(min(count, 1), np.int64), ends[:-1] + 1])
    lengths = ends - starts + 1
    longest = int(lengths.max(initial=0))
    if longest > _LONGEST_VARINT:
        raise ValueError(f"a gap takes more than {_LONGEST_VARINT} bytes")
    gaps = np.zeros(count, np.int64)
    for i in range(longest):
        here = lengths > i
        gaps[here] |= (raw[starts[here] + i] & 127).astype(np.int64) << (7 * i)
    return _positions(gaps, size)


# rice -----------------------------------------------------------------------------


def _rice(gaps: Positions) -> tuple[int, int]:
    """Return the best shift, and the bits of the unary half with it."""
    count = len(gaps)
    mean = int(gaps.sum()) / count if count else 0.0
    guess = max(int(mean * np.log(2)), 1).bit_length() - 1
    costs = {}
    for shift in range(max(guess - 1, 0), guess + 2):
        unary = count + int((gaps >> shift).sum())
        costs[shift] = (unary + 7) // 8 + (count * shift + 7) // 8, unary
    best = min(costs, key=lambda shift: costs[shift][0])
    return best, costs[best][1]


def _length_rice(positions: Positions, size: int) -> int:
    gaps = _gaps(positions)
    shift, unary = _rice(gaps)
    return 1 + (unary + 7) // 8 + (len(gaps) * shift + 7) // 8


def _encode_rice(positions: Positions, size: int) -> bytes:
    gaps = _gaps(positions)
    shift, unary = _rice(gaps)
    ends = np.cumsum((gaps >> shift) + 1)
    ends -= 1
    high = np.zeros(unary, np.uint8)
    high[ends] = 1
    low = np.empty((len(gaps), shift), np.uint8)
    for i in range(shift):
        low[:, i] = (gaps >> (shift - 1 - i)) & 1
    packed = np.packbits(high).tobytes() + np.packbits(low).tobytes()
    return bytes([shift]) + packed


def _decode_rice(data: Buffer, count: int, size: int) -> Positions:
    raw = np.frombuffer(data, np.uint8)
    if not len(raw):
        raise ValueError("a mask of Rice codes needs a shift")
    shift = int(raw[0])
    # The best shift is at most the logarithm of twice the mean gap.
    if count << shift > 2 * size:
        raise ValueError(f"a shift of {shift} for {count} values among {size}")
    tail = (count * shift + 7) // 8
    if len(raw) < 1 + tail:
        raise ValueError("a mask of Rice codes is cut off")
    unary = count + ((size - count) >> shift)
    high, low = raw[1 : len(raw) - tail], raw[len(raw) - tail :]
    _at_most(high, (unary + 7) // 8)
    ends = _counted(np.flatnonzero(np.unpackbits(high).view(np.bool_)), count)
    if len(high) != ((ends[-1] + 8) // 8 if count else 0):
        raise ValueError("bytes behind the end of a mask")
    gaps = _gaps(ends)
    bits = _unpack(low, count * shift).reshape(count, shift)
    for i in range(shift):
        gaps <<= 1
        gaps |= bits[:, i]
    return _positions(gaps, size)


#: All codes, by name. Their order is part of the wire format.
MASK_CODES: dict[str, MaskCode] = {
    "bitmap": MaskCode(
        lambda positions, size: (size + 7) // 8, _encode_bitmap, _decode_bitmap
    ),
    "int32": MaskCode(
        lambda positions, size: 4 * len(positions), _encode_int32, _decode_int32
    ),
    "varint": MaskCode(
        lambda positions, size: int(_varint_lengths(_gaps(positions)).sum()),
        _encode_varint,
        _decode_varint,
    ),
    "rice": MaskCode(_length_rice, _encode_rice, _decode_rice),
}
