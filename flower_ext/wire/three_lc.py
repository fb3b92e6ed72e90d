r"""3LC: three values, five in a byte, and runs of zeros in one.

Lim, Andersen and Kaminsky 2019, "3LC: lightweight and effective traffic compression for
distributed machine learning", section 3.
"""

from dataclasses import dataclass

import numpy as np
from flwr.common import NDArray

from flower_ext.core.errors import at_least, refuse
from flower_ext.wire.buckets import precision
from flower_ext.wire.ternary import ZEROS, Bytes, pack, packed_length, signs, unpack
from flower_ext.wire.value_codes import Buffer, ValueCode

# A byte from here on stands for 2, 3, ... 14 bytes of zeros.
_RUNS = 243
_LONGEST_RUN = 14


@dataclass(frozen=True)
class ThreeLC(ValueCode):
    r"""Each value rounded to -M, 0 or M, with M a multiple of the largest magnitude.

    .. math:: M = s \max_i |x_i|, \quad q_i = \operatorname{round}(x_i / M), \quad
        \tilde x_i = M q_i

    No value is off by more than M/2. Five :math:`q_i` take a byte ("quartic encoding"),
    and up to 14 bytes of zeros one ("zero-run encoding"): 1.6 bits a value at most, of
    zeros 0.11, and 8 bytes for each array (12 for one of float64).

    The rounding is biased, and for most values to zero: meant with
    :class:`~flower_ext.wire.ErrorFeedback`, which is outside of it here. What is left
    out then stays below :math:`s/(2 - s)` times the largest change.

    An array with a value that is not finite, or with an M that is not, comes back as
    NaN.

    Parameters
    ----------
    sparsity : float (default: 1)
        The paper's sparsity multiplication s, 1 <= s < 2: the larger, the more zeros.

    Notes
    -----
    Deviation from the paper: the five values of a byte are neighbours, not of five
    parts of the array, which is of the same length.

    Examples
    --------
    >>> x = {"w": np.float32([2, 0.5, -1.5])}
    >>> ThreeLC().decode(ThreeLC().encode(x), x)
    {'w': array([ 2.,  0., -2.], dtype=float32)}
    """

    sparsity: float = 1.0

    tag = b"3l"

    def __post_init__(self) -> None:
        sparsity = at_least("sparsity", self.sparsity, 1)
        if not sparsity < 2:
            refuse("sparsity", self.sparsity, "< 2", "all values would become zero")
        object.__setattr__(self, "sparsity", sparsity)

    @classmethod
    def length(cls, count: int, dtype: np.dtype) -> None:
        """Return None: it depends on the zeros."""

    def encode_values(self, values: NDArray, generator: np.random.Generator) -> bytes:
        """Return M, and the packed values."""
        wide = precision(values.dtype)
        magnitude = np.abs(values).astype(wide, copy=False)
        with np.errstate(over="ignore"):
            scale = wide.type(magnitude.max(initial=0) * self.sparsity)
        # Halves are rounded to even; nothing is above half of what is not finite.
        packed = pack(signs(magnitude > scale / 2, values < 0))
        coded: bytes = scale.astype(wide).tobytes() + _shorten(packed).tobytes()
        return coded

    @classmethod
    def decode_values(cls, data: Buffer, count: int, dtype: np.dtype) -> NDArray:
        """Return M times -1, 0 or 1."""
        wide = precision(dtype)
        if len(data) < wide.itemsize:
            raise ValueError("there is no scale")
        scale = np.frombuffer(data, wide, 1)
        coded = np.frombuffer(data, np.uint8, offset=wide.itemsize)
        packed = _lengthen(coded, packed_length(count))
        with np.errstate(invalid="ignore", over="ignore"):
            return np.asarray(unpack(packed, count) * scale, dtype)


def _shorten(packed: Bytes) -> Bytes:
    """Replace runs of bytes of zeros, 14 at a time."""
    zeros = packed == ZEROS
    edges = np.flatnonzero(np.diff(zeros, prepend=False, append=False))
    starts, ends = edges[::2], edges[1::2]
    # Where in its run each byte of zeros is, and how many of it are left.
    place = np.flatnonzero(zeros)
    lengths = ends - starts
    past = place - np.repeat(starts, lengths)
    left = np.repeat(ends, lengths) - place
    first = past % _LONGEST_RUN == 0
    place, left = place[first], np.minimum(left[first], _LONGEST_RUN)
    keep = ~zeros
    keep[place] = True
    coded = packed.copy()
    coded[place] = np.where(left > 1, _RUNS - 2 + left, ZEROS)
    kept: Bytes = coded[keep]
    return kept


def _lengthen(coded: Bytes, length: int) -> Bytes:
    """Put runs back; what is longer than that is refused before it is allocated."""
    if len(coded) > length:
        raise ValueError(f"{len(coded)} bytes, must be at most {length}")
    runs = coded >= _RUNS
    repeats = np.where(runs, coded.astype(np.int64) - (_RUNS - 2), 1)
    if repeats.sum() != length:
        raise ValueError(f"{repeats.sum()} bytes, must be {length}")
    return np.repeat(np.where(runs, np.uint8(ZEROS), coded), repeats)
