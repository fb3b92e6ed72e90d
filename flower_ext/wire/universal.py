r"""Quantisation in uniform steps, with a universal code of the integers.

Mitchell, Ballé, Charles and Konečný 2022, "Optimizing the communication-accuracy
trade-off in federated learning with rate-distortion theory" (arXiv:2201.02664). Values
are rounded to multiples of a step, most of them to zero if the step is coarse. Of each
integer that is not zero travel the zeros before it and its magnitude, in Elias's gamma
code, and a sign: few bits where they are few and small, whatever they are distributed
as.

Bits a value, and squared error a value, of values with a Laplace distribution and a
root mean square of 1, rounded to nearest, with either code::

    step                0.25     0.5      1       2       5
    bits, gamma         4.69     3.43     2.37    1.41    0.315
    bits, entropy       3.97     2.98     2.03    1.14    0.221
    entropy             3.95     2.96     2.01    1.13    0.219
    squared error       0.0052   0.0205   0.0788  0.269   0.789
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Literal, get_args

import numpy as np
from flwr.common import NDArray

from flower_ext.core.arrays import Arrays, all_finite, is_averaged
from flower_ext.core.errors import one_of, positive, refuse
from flower_ext.core.schedules import Scheduled, value_in
from flower_ext.wire import rans
from flower_ext.wire.codec import Decoded, Reader, Sending, Stage, Written
from flower_ext.wire.elias import BitReader, BitWriter
from flower_ext.wire.mask_codes import MAX_SIZE, Positions
from flower_ext.wire.masks import Scope
from flower_ext.wire.value_codes import Buffer, Exact, ValueCode

Normalization = Literal["none", "mean", "max", "rms"]
Rounding = Literal["nearest", "stochastic", "dithered"]
Coding = Literal["gamma", "entropy"]

# What an array of values begins with.
_EXACT, _ZEROS, _ROUNDED, _DITHERED = range(4)
_ENTROPY = 4  # is added to what is rounded
_HEAD = struct.Struct("<fI")
# Bytes of the seed of the noise.
_SEED = 8
# Integers for which histograms take more bytes than they save.
_FEW = 1024


@dataclass(frozen=True)
class UniversalCode(ValueCode):
    r"""Multiples of a step, in fewer bits the coarser it is.

    The integers :math:`\mathrm{round}(x / (\mathrm{step} \cdot \mathrm{norm}))` travel
    exactly, and the product of step and norm with them, for each array apart. In the
    code of Mitchell et al. (2022) the bits are the same, and their order is another.

    Parameters
    ----------
    step : float or callable
        Above 0, or ``server_round -> step``. The finer, the more bits: about one for
        each halving. By vote of the clients: :class:`~flower_ext.CodecVote`.
    normalization : {"rms", "mean", "max", "none"}
        What a step is a multiple of, in each array: the root mean square, the mean or
        the largest magnitude of its values, or 1.
    rounding : {"nearest", "stochastic", "dithered"}
        To the nearest integer, which has the least error; up or down at random, which
        is right on average; or to the nearest after adding noise that the receiver
        subtracts: right on average, too, with an error of at most half a step that
        does not depend on the values. Only the seed of the noise travels.
    scope : {"tensor", "global"}
        Whether each array has its norm and its code, or all arrays are taken as one
        vector, in the order of their names: less for each of many small arrays, and
        nothing of an array whose values are small against the others'. Mixed precisions
        are coded in the widest. An array with a value that is not finite stays apart.
    coding : {"gamma", "entropy"}
        How the zeros before each integer, and its magnitude, travel: in Elias's code,
        which suits any distribution, or in few bits more than their entropy, by
        histograms of both that go along in some 100 bytes. Of fewer than 1024
        integers that are not zero it is Elias's code.

    Notes
    -----
    Deviation from the paper: in its second code the server sends the clients a
    histogram of the integers. Here it is of the very integers that are sent, so that
    nothing must be known to both ends, and no integer is without a code.

    The error of a value is at most half a step times the norm (stochastic: a whole
    one), and the rounding of the array's precision. It may lengthen a vector that was
    clipped, so a strategy's mechanism clips what it decodes. Zeros alone are exact, and
    so are values that are not finite, or whose array has values of more steps than its
    precision tells apart; the latter travel as they are.

    Examples
    --------
    >>> codec = UniversalCode(0.5, normalization="none")
    >>> record = codec.encode({"w": np.float32([0.1, -0.9, 0, 0, 2.6])})
    >>> codec.decode(record, {"w": np.zeros(5, np.float32)})
    {'w': array([ 0. , -1. ,  0. ,  0. ,  2.5], dtype=float32)}
    """

    step: Scheduled
    normalization: Normalization = "rms"
    rounding: Rounding = "nearest"
    scope: Scope = "tensor"
    coding: Coding = "gamma"

    tag = b"uc"

    def __post_init__(self) -> None:
        step = self._step()
        if not callable(self.step):
            object.__setattr__(self, "step", step)
        one_of("normalization", self.normalization, get_args(Normalization))
        one_of("rounding", self.rounding, get_args(Rounding))
        one_of("scope", self.scope, get_args(Scope))
        one_of("coding", self.coding, get_args(Coding))

    def _step(self) -> float:
        cause = "a multiple of the norm; exact values are Exact()"
        return positive("step", value_in(self.step, 1), cause)

    @property
    def unbiased(self) -> bool:
        """Whether rounding is random."""
        return self.rounding != "nearest"

    def write(self, arrays: Arrays, sending: Sending) -> Written:
        """Return which arrays are one vector, its code, and those of the others."""
        floats = [n for n in sorted(arrays) if is_averaged(arrays[n])]
        joined = [self._joins(n, arrays[n], sending) for n in floats]
        names = list(compress(floats, joined))
        parts = [np.packbits(np.array(joined, np.bool_)).tobytes()]
        if names:
            vector = np.concatenate([arrays[n].reshape(-1) for n in names])
            if vector.size > MAX_SIZE:
                cause = f"a vector of {vector.size} values is too long"
                refuse("scope", self.scope, "'tensor'", cause)
            parts += super().write({"": vector}, sending).parts
        apart = {n: x for n, x in arrays.items() if n not in names}
        parts += super().write(apart, sending).parts
        return Written(parts, sum(x.size for x in arrays.values()))

    def _joins(self, name: str, x: NDArray, sending: Sending) -> bool:
        """Whether an array is a part of the vector."""
        own = self.scope == "tensor" or name in sending.silent
        return not own and all_finite([x])

    @classmethod
    def read(
        cls, reader: Reader, like: Arrays, then: Sequence[type[Stage]] = ()
    ) -> Decoded:
        """Return arrays of all values, some of which may have been one vector."""
        floats = [n for n in sorted(like) if is_averaged(like[n])]
        flags = np.frombuffer(reader.take((len(floats) + 7) // 8), np.uint8)
        joined = np.unpackbits(flags)
        if joined[len(floats) :].any():
            raise ValueError("bits behind the last array")
        names = list(compress(floats, joined))
        found = {}
        if names:
            size = sum(like[n].size for n in names)
            widest = np.result_type(*(like[n].dtype for n in names))
            vector = {"": np.broadcast_to(np.zeros((), widest), (size,))}
            values = super().read(reader, vector, then).arrays[""]
            for name in names:
                x = like[name]
                with np.errstate(over="ignore"):
                    found[name] = values[: x.size].astype(x.dtype).reshape(x.shape)
                values = values[x.size :]
        apart = {n: x for n, x in like.items() if n not in found}
        found |= super().read(reader, apart, then).arrays
        return Decoded(found, sum(x.size for x in like.values()))

    @classmethod
    def length(cls, count: int, dtype: np.dtype) -> None:
        """Return None: it depends on the values."""

    def encode_values(self, values: NDArray, generator: np.random.Generator) -> bytes:
        """Return the bytes of the integers, or of the values as they are."""
        wide = values.astype(_working(values.dtype), copy=False)
        largest = float(np.maximum(wide.max(initial=0), -wide.min(initial=0)))
        if largest == 0:
            return bytes([_ZEROS])
        with np.errstate(all="ignore"):
            spacing = np.float32(self._step() * self._norm(wide, largest))
            steps = largest / np.float64(spacing)
        if not 0 < steps < _most_steps(wide.dtype):  # NaN and infinities, too
            return bytes([_EXACT]) + Exact().encode_values(values, generator)
        scaled = wide / spacing
        mode, seed = _ROUNDED, b""
        if self.rounding == "stochastic":
            low = np.floor(scaled)
            low += generator.random(low.shape, low.dtype) < scaled - low
            scaled = low
        elif self.rounding == "dithered":
            mode, seed = _DITHERED, generator.bytes(_SEED)
            scaled += _noise(seed, scaled)
        integers = np.rint(scaled, out=scaled)
        positions = np.flatnonzero(integers != 0)
        by_entropy = self.coding == "entropy" and len(positions) >= _FEW
        head = bytes([mode + by_entropy * _ENTROPY])
        head += _HEAD.pack(spacing, len(positions)) + seed
        return head + _pack(positions, integers[positions], by_entropy)

    def _norm(self, values: NDArray, largest: float) -> float:
        if self.normalization == "max":
            return largest
        if self.normalization == "mean":
            return float(np.abs(values).mean(dtype=np.float64))
        if self.normalization == "rms":
            unit = values / values.dtype.type(largest)  # whose squares are in range
            return largest * math.sqrt(np.dot(unit, unit) / unit.size)
        return 1.0

    @classmethod
    def decode_values(cls, data: Buffer, count: int, dtype: np.dtype) -> NDArray:
        """Return the integers times what they are multiples of."""
        reader = Reader(memoryview(data))
        (mode,) = reader.take(1)
        if mode == _EXACT:
            exact = reader.take(Exact.length(count, dtype))
            values = Exact.decode_values(exact, count, dtype)
        elif mode == _ZEROS:
            values = np.zeros(count, dtype)
        elif mode & ~_ENTROPY in (_ROUNDED, _DITHERED):
            values = _read_integers(reader, mode, count, _working(dtype))
            with np.errstate(over="ignore"):
                values = values.astype(dtype)
        else:
            raise ValueError(f"{mode} is no way to code values")
        if reader.left:
            raise ValueError(f"{reader.left} bytes behind the values")
        return values


def _working(dtype: np.dtype) -> np.dtype:
    """Return the precision to calculate in."""
    return np.dtype(np.float32 if dtype.itemsize <= 4 else np.float64)


def _most_steps(dtype: np.dtype) -> int:
    """Return below how many steps all integers, and one more, are exact numbers."""
    return 1 << int(np.finfo(dtype).nmant)


def _noise(seed: bytes | memoryview, like: NDArray) -> NDArray:
    """Return the uniform noise in [-1/2, 1/2] that both ends draw of a seed."""
    # The raw output of a bit generator, which no release of NumPy changes.
    drawn = np.random.PCG64(int.from_bytes(seed, "little"))
    raw = drawn.random_raw((like.size + 1) // 2).astype("<u8", copy=False)
    noise = raw.view("<u4")[: like.size].astype(like.dtype)
    noise *= like.dtype.type(2.0**-32)
    noise -= like.dtype.type(0.5)
    return noise


def _pack(positions: Positions, integers: NDArray, by_entropy: bool) -> bytes:
    """Return the code of integers that are not zero, at their positions."""
    gaps = np.diff(positions, prepend=-1)
    magnitudes = np.abs(integers).astype(np.int64)
    bits, coded = BitWriter(), b""
    bits.flags(integers < 0)
    if by_entropy:
        coded = rans.encode(gaps - 1, bits) + rans.encode(magnitudes - 1, bits)
    else:
        bits.gamma(gaps)
        bits.gamma(magnitudes)
    return coded + bits.packed()


def _read_integers(reader: Reader, mode: int, count: int, dtype: np.dtype) -> NDArray:
    """Return the multiples of the spacing that the sender rounded to."""
    spacing, nonzero = reader.unpack(_HEAD)
    if not 0 < spacing < np.inf or nonzero > count:
        raise ValueError(f"{nonzero} of {count} values are multiples of {spacing}")
    dithered = mode & ~_ENTROPY == _DITHERED
    seed = reader.take(_SEED) if dithered else b""
    most = _most_steps(dtype) + 1
    if mode & _ENTROPY:
        coded = [rans.Coded(reader, nonzero) for _ in range(2)]
        bits = BitReader(reader.take(reader.left))
        negative = bits.flags(nonzero)
        gaps, magnitudes = (
            x.integers(bits, limit) + 1
            for x, limit in zip(coded, (count, most), strict=True)
        )
    else:
        bits = BitReader(reader.take(reader.left))
        negative = bits.flags(nonzero)
        gaps = bits.gamma(nonzero, count + 1)
        magnitudes = bits.gamma(nonzero, most + 1)
    bits.end()
    positions = np.cumsum(gaps) - 1
    if nonzero and positions[-1] >= count:
        raise ValueError("a position is out of range")
    values = np.zeros(count, dtype)
    values[positions] = np.where(negative, -magnitudes, magnitudes)
    if dithered:
        values -= _noise(seed, values)
    with np.errstate(over="ignore"):
        values *= dtype.type(spacing)
    return values
