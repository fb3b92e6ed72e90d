r"""QSGD: random rounding to multiples of a share of the norm.

Alistarh, Grubic, Li, Tomioka and Vojnovic 2017, "QSGD: communication-efficient SGD via
gradient quantization and encoding", section 3.
"""

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from flwr.common import NDArray

from flower_ext.core.errors import refuse, whole
from flower_ext.wire.buckets import (
    bucket_in,
    in_buckets,
    num_buckets,
    precision,
    spread,
)
from flower_ext.wire.codec import Reader
from flower_ext.wire.mask_codes import MASK_CODES, Positions
from flower_ext.wire.value_codes import Buffer, ValueCode

Levels = npt.NDArray[np.int8]

# Bits, whether they are a fixed number for each level, and the length of buckets.
_HEAD = struct.Struct("<B?I")
# Of the levels that are not zero: the code of their places, how many they are, bytes of
# the places, the code of their sizes, and the sum of these.
_SPARSE = struct.Struct("<BIIBQ")
# The rarer kind of places lies almost independently, for which Rice's code is good.
_ONES, _ZEROS, _BITMAP = range(3)
# Values that are rounded together: those that a processor's cache holds.
_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class QSGD(ValueCode):
    r"""Each value rounded at random to one of 2s + 1 levels of its bucket's norm.

    With :math:`s = 2^{\text{bits} - 1} - 1` and the norm of a bucket,

    .. math:: \tilde x_i = \|x\|_2 \operatorname{sign}(x_i)\, l_i / s,

    where :math:`l_i` is one of the integers beside :math:`s |x_i| / \|x\|_2`, the upper
    one with a probability that is the distance to the lower (equation 3.1). That is
    right on average; the variance of a bucket of d values is at most
    :math:`\min(d/s^2, \sqrt d/s) \|x\|_2^2` (lemma 3.1).

    The levels of an array travel in the shorter of two codes: as sign and size in a
    fixed number of ``bits``, or as the places of those that are not zero, their signs,
    and their sizes in unary, of which the rarer of ones and zeros have Rice's code. The
    second is the shorter but for short arrays or buckets, and at most 5% longer than
    the entropy of the levels: of normal values, in buckets of 512, a value takes 0.26
    bits with ``bits=2``, 1.07 with 4, 2.6 with 6 and 4.7 with 8. A bucket takes a
    float32 besides (of an array of float64: a float64), 0.06 bits a value, and an array
    28 bytes.

    A bucket with a value, or a norm, that is not finite comes back as NaN.

    Parameters
    ----------
    bits : int (default: 4)
        2 to 8. With 2 bits a value becomes 0 or the norm.
    bucket : int (default: 512)
        Values of an array, in their order, that share a norm; the paper's d.

    Notes
    -----
    Where the bound on the variance is above the squared norm,
    :class:`~flower_ext.wire.ErrorFeedback` would let what is left out grow from round
    to round: with buckets of 512 it is not for 6 bits and more.

    Deviation from the paper: Rice's code (Golomb 1966; Rice and Plaut 1971) instead of
    Elias's: the gaps between places are about geometric, for which it is nearly an
    entropy code. Elias's gamma code of gaps and sizes takes 0.37, 1.40, 3.2 and 5.9
    bits for the values above.

    Examples
    --------
    >>> x = {"w": np.float32([0, 0, -5, 0])}
    >>> QSGD(2).decode(QSGD(2).encode(x), x)
    {'w': array([ 0.,  0., -5.,  0.], dtype=float32)}
    """

    bits: int = 4
    bucket: int = 512

    tag = b"qs"

    def __post_init__(self) -> None:
        bits = whole("bits", self.bits, 2, "a sign, and at least one for the level")
        if bits > 8:
            refuse("bits", self.bits, "<= 8", "BFloat16() is for higher precision")
        object.__setattr__(self, "bits", bits)
        object.__setattr__(self, "bucket", bucket_in("bucket", self.bucket))

    @property
    def unbiased(self) -> bool:
        """True."""
        return True

    @classmethod
    def length(cls, count: int, dtype: np.dtype) -> None:
        """Return None: it depends on the levels."""

    def encode_values(self, values: NDArray, generator: np.random.Generator) -> bytes:
        """Return the settings, the norms, and the levels in the shorter code."""
        x = in_buckets(values, self.bucket)
        norms = _norms(x)
        drawn = _drawn(x, norms, _top(self.bits), generator)
        levels = drawn.reshape(-1)[: values.size]
        coded = _encode_sparse(levels)
        fixed = len(coded) > _fixed_length(levels.size, self.bits)
        if fixed:
            coded = _encode_fixed(levels, self.bits)
        return _HEAD.pack(self.bits, fixed, self.bucket) + norms.tobytes() + coded

    @classmethod
    def decode_values(cls, data: Buffer, count: int, dtype: np.dtype) -> NDArray:
        """Return for each value its level's share of the norm of its bucket."""
        reader = Reader(memoryview(data))
        bits, fixed, bucket = reader.unpack(_HEAD)
        if not 2 <= bits <= 8 or not bucket:
            raise ValueError(f"{bits} bits, in buckets of {bucket} values")
        wide = precision(dtype)
        length = num_buckets(count, bucket) * wide.itemsize
        norms = np.frombuffer(reader.take(length), wide)
        decode = _decode_fixed if fixed else _decode_sparse
        levels = decode(reader, count, bits)
        if reader.left:
            raise ValueError(f"{reader.left} bytes behind the last level")
        top = _top(bits)
        shares = (np.arange(256, dtype=np.uint8).view(np.int8) / top).astype(wide)
        with np.errstate(invalid="ignore", over="ignore"):
            found = shares[levels.view(np.uint8)] * spread(norms, bucket, count)
            return np.asarray(found, dtype)


def _top(bits: int) -> int:
    """Return the highest level."""
    return (1 << (bits - 1)) - 1


def _norms(x: NDArray) -> NDArray:
    """Return the norm of each bucket; squares neither vanish nor overflow before."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.einsum("ij,ij->i", x, x, dtype=np.float64, casting="safe")
        return np.asarray(np.sqrt(squares), x.dtype)


def _drawn(
    x: NDArray, norms: NDArray, top: int, generator: np.random.Generator
) -> Levels:
    """Return the levels of values, ``(buckets, length)``, with their signs."""
    usable = np.isfinite(norms) & (norms > 0)
    norms = np.where(usable, norms, np.inf).astype(x.dtype)[:, None]
    levels = np.empty(x.shape, np.int8)
    rows = max(_AT_ONCE // x.shape[1], 1)
    for start in range(0, len(x), rows):
        some = slice(start, start + rows)
        unit = np.abs(x[some])
        with np.errstate(invalid="ignore"):  # an infinity over itself is NaN
            unit /= norms[some]
        unit *= top
        unit += generator.random(unit.shape, x.dtype.newbyteorder("="))
        np.fmin(unit, top, out=unit)
        np.copyto(levels[some], unit, casting="unsafe")
        np.negative(levels[some], out=levels[some], where=x[some] < 0)
    return levels


def _fixed_length(count: int, bits: int) -> int:
    return (count * bits + 7) // 8


def _encode_fixed(levels: Levels, bits: int) -> bytes:
    codes = np.abs(levels).view(np.uint8)
    codes |= (levels < 0).view(np.uint8) << (bits - 1)
    return np.packbits(np.unpackbits(codes[:, None], axis=1)[:, 8 - bits :]).tobytes()


def _decode_fixed(reader: Reader, count: int, bits: int) -> Levels:
    data = np.frombuffer(reader.take(_fixed_length(count, bits)), np.uint8)
    planes = np.zeros((count, 8), np.uint8)
    planes[:, 8 - bits :] = np.unpackbits(data, count=count * bits).reshape(-1, bits)
    codes = np.packbits(planes, axis=1).reshape(-1)
    levels = (codes & _top(bits)).view(np.int8)
    np.negative(levels, out=levels, where=codes > _top(bits))
    return levels


def _encode_sparse(levels: Levels) -> bytes:
    places = np.flatnonzero(levels)
    found = levels[places]
    # Each size in unary: as many places as it is, the last of which is a one.
    ends = np.cumsum(np.abs(found), dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    ends -= 1
    of_places, mask = _encode_mask(places, levels.size)
    of_sizes, sizes = _encode_mask(ends, total)
    head = _SPARSE.pack(of_places, len(found), len(mask), of_sizes, total)
    return head + mask + np.packbits(found < 0).tobytes() + sizes


def _decode_sparse(reader: Reader, count: int, bits: int) -> Levels:
    of_places, nonzero, length, of_sizes, total = reader.unpack(_SPARSE)
    top = _top(bits)
    if nonzero > count or not nonzero <= total <= nonzero * top:
        raise ValueError(f"{nonzero} levels of {count}, {total} in all")
    places = _decode_mask(reader.take(length), of_places, nonzero, count)
    signs = np.frombuffer(reader.take((nonzero + 7) // 8), np.uint8)
    negative = np.unpackbits(signs, count=nonzero).view(np.bool_)
    ends = _decode_mask(reader.take(reader.left), of_sizes, nonzero, total)
    sizes = np.diff(ends, prepend=-1)
    if sizes.max(initial=0) > top or sizes.sum() != total:
        raise ValueError(f"levels above {top}, or of another sum than {total}")
    found = sizes.astype(np.int8)
    np.negative(found, out=found, where=negative)
    levels = np.zeros(count, np.int8)
    levels[places] = found
    return levels


def _encode_mask(places: Positions, size: int) -> tuple[int, bytes]:
    """Return which code is the shortest for the places of ones, and its bytes."""
    which = _ZEROS if 2 * len(places) > size else _ONES
    rare = _others(places, size) if which == _ZEROS else places
    coded = MASK_CODES["rice"].encode(rare, size)
    if len(coded) <= (size + 7) // 8:
        return which, coded
    return _BITMAP, MASK_CODES["bitmap"].encode(places, size)


def _decode_mask(data: Buffer, which: int, ones: int, size: int) -> Positions:
    """Return the places of that many ones."""
    if which == _ONES:
        return MASK_CODES["rice"].decode(data, ones, size)
    if which > _BITMAP or (which == _ZEROS and size > 2 * ones):
        raise ValueError(f"mask code {which} of {ones} among {size}")
    if which == _BITMAP:
        return MASK_CODES["bitmap"].decode(data, ones, size)
    return _others(MASK_CODES["rice"].decode(data, size - ones, size), size)


def _others(places: Positions, size: int) -> Positions:
    """Return all other places."""
    mask = np.ones(size, np.bool_)
    mask[places] = False
    return np.flatnonzero(mask)
