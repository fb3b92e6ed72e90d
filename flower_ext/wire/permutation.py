"""A code for rankings, and for all else that is a permutation of even steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from flwr.common import NDArray

from flower_ext.core.arrays import Arrays
from flower_ext.core.errors import refuse
from flower_ext.wire.codec import Decoded, Reader, Sending, Stage, Written
from flower_ext.wire.mask_codes import MAX_SIZE
from flower_ext.wire.value_codes import Buffer, Exact

Places = npt.NDArray[np.int64]

# What an array is coded as: a byte before it.
_EXACT, _PERMUTATION = b"\0", b"\1"


def is_permutation(places: NDArray) -> bool:
    """Whether integers are 0, 1, ... in any order, each of them once.

    Examples
    --------
    >>> is_permutation(np.array([2, 0, 1])), is_permutation(np.array([2, 0, 2]))
    (True, False)
    """
    size = places.size
    if size and (places.min() < 0 or places.max() >= size):
        return False
    seen = np.zeros(size, np.bool_)
    seen[places.reshape(-1)] = True
    return bool(seen.all())


def packed_length(size: int) -> int:
    """Return the bytes of :func:`pack`: about ``ceil(log2(size))`` bits a place."""
    whole, bits = divmod(_width(size), 8)
    return whole * size + bits * ((size + 7) // 8)


def pack(places: NDArray) -> bytes:
    """Return the bytes of a permutation of 0, 1, ..., ``size - 1``.

    Parameters
    ----------
    places : ndarray of integers
        Of shape ``(size,)``, each number once; ``size`` is at most 2**31 - 1.

    Returns
    -------
    bytes
        The low bytes of all numbers, and then each of the bits above them, packed. The
        shortest code of all, a number below ``size!``, would take 1.44 to 2.44 bits a
        number less, and more than linear time.
    """
    size = places.size
    if size > MAX_SIZE:
        refuse("size", size, f"<= {MAX_SIZE}", "divide the array")
    whole, bits = divmod(_width(size), 8)
    numbers = places.astype("<u4")
    parts = [numbers.view(np.uint8).reshape(size, 4)[:, :whole].tobytes()]
    for bit in range(8 * whole, 8 * whole + bits):
        parts.append(np.packbits((numbers >> bit & 1).astype(np.uint8)).tobytes())
    return b"".join(parts)


def unpack(data: Buffer, size: int) -> Places:
    """Return the permutation that :func:`pack` wrote.

    Raises
    ------
    ValueError
        If the bytes are not as many, or a number is out of range or repeated.
    """
    if len(data) != packed_length(size):
        raise ValueError(f"{len(data)} bytes, must be {packed_length(size)}")
    whole, bits = divmod(_width(size), 8)
    raw = np.frombuffer(data, np.uint8)
    numbers = np.zeros((size, 4), np.uint8)
    numbers[:, :whole] = raw[: whole * size].reshape(size, whole)
    places = numbers.view("<u4").reshape(-1)
    planes = raw[whole * size :].reshape(bits, (size + 7) // 8)
    for bit, plane in enumerate(planes, 8 * whole):
        found = np.unpackbits(plane)
        if found[size:].any():
            raise ValueError("bits behind the end of a permutation are set")
        places |= found[:size].astype(np.uint32) << np.uint32(bit)
    if not is_permutation(places):
        raise ValueError("no permutation: a number is out of range or repeated")
    return places.astype(np.int64)


def _width(size: int) -> int:
    return max(size - 1, 0).bit_length()


def even_steps(places: Places, first: float, last: float, dtype: np.dtype) -> NDArray:
    """Return where steps are between two numbers, if as many as places are even.

    Parameters
    ----------
    places : ndarray of int64
        Numbers of steps, from 0 to ``places.size - 1``; there are two at least.
    first, last : float
        The numbers of the first step and of the last.
    dtype : numpy.dtype
        To which each is rounded, once.

    Examples
    --------
    >>> even_steps(np.array([2, 0, 1]), -1.0, 1.0, np.dtype(np.float32))
    array([ 1., -1.,  0.], dtype=float32)
    """
    found = places * ((float(last) - float(first)) / (places.size - 1))
    found += float(first)
    found[places == places.size - 1] = last
    with np.errstate(invalid="ignore"):  # beyond the range of integers
        return found.astype(dtype)


@dataclass(frozen=True)
class Permutation(Stage):
    r"""Rankings: arrays that are even steps in any order take the order only.

    An array of n numbers :math:`a, a + s, \dots, a + (n - 1)s`, each of them once and
    in any order, travels as the first, the last, and which is where, in
    :math:`\lceil \log_2 n \rceil` bits a number. Integers from 0 are such, and the
    scores of :class:`~flower_ext.strategies.FederatedRankLearning`. All other arrays
    travel as they are. It is bit for bit either way.

    Notes
    -----
    A record whose numbers are out of range or repeated is refused. What is read with it
    need not be a permutation: an array that travelled as it is may be anything.

    Examples
    --------
    >>> ranks = {"w": np.random.default_rng(0).permutation(1000)}
    >>> record = Permutation().encode(ranks)
    >>> record.count_bytes() < 1000 * 10 / 8 + 200
    True
    >>> np.array_equal(Permutation().decode(record, ranks)["w"], ranks["w"])
    True
    """

    tag = b"pm"

    @property
    def lossless(self) -> bool:
        """True."""
        return True

    def write(self, arrays: Arrays, sending: Sending) -> Written:
        """Return first, last and order of each array, or the array."""
        parts: list[bytes] = []
        for _, x in sorted(arrays.items()):
            places = _places(x.reshape(-1))
            if places is None:
                coded = Exact().encode_values(x.reshape(-1), sending.generator)
                parts += [_EXACT, coded]
            else:
                ends = np.array([x.min(), x.max()], x.dtype)
                coded = Exact().encode_values(ends, sending.generator)
                parts += [_PERMUTATION, coded, pack(places)]
        return Written(parts, sum(x.size for x in arrays.values()))

    @classmethod
    def read(
        cls, reader: Reader, like: Arrays, then: Sequence[type[Stage]] = ()
    ) -> Decoded:
        """Return the arrays."""
        if then:
            raise ValueError(f"nothing comes behind {cls.__name__} in a chain")
        arrays = {name: _read(reader, x) for name, x in sorted(like.items())}
        return Decoded(arrays, sum(x.size for x in like.values()))


def _read(reader: Reader, like: NDArray) -> NDArray:
    kind, size, dtype = bytes(reader.take(1)), like.size, like.dtype
    count = 2 if kind == _PERMUTATION else size
    values = Exact.decode_values(reader.take(count * dtype.itemsize), count, dtype)
    if kind == _EXACT:
        return values.reshape(like.shape)
    if kind != _PERMUTATION or not _can_be_steps(size, dtype):
        raise ValueError(f"an array of {size} {dtype} is not coded as {kind!r}")
    first, last = values.tolist()
    if not first < last or not math.isfinite(float(last) - float(first)):
        raise ValueError(f"steps from {first} to {last}")
    places = unpack(reader.take(packed_length(size)), size)
    return even_steps(places, first, last, dtype).reshape(like.shape)


def _can_be_steps(size: int, dtype: np.dtype) -> bool:
    return 2 <= size <= MAX_SIZE and dtype.kind in "fiu"


def _places(flat: NDArray) -> Places | None:
    """Return which step each number is; None unless they are even steps, bit for bit.

    No sort: the step is known from the ends, and the place of a number from its value.
    """
    if not _can_be_steps(flat.size, flat.dtype):
        return None
    first, last = flat.min().item(), flat.max().item()
    span = float(last) - float(first)
    if not 0 < span < math.inf:  # a NaN, too
        return None
    steps = np.subtract(flat, float(first), dtype=np.float64)
    steps *= (flat.size - 1) / span
    places = np.rint(steps, out=steps).astype(np.int64)
    if not is_permutation(places):
        return None
    bits = np.dtype(f"u{flat.dtype.itemsize}")
    found = even_steps(places, first, last, flat.dtype).view(bits)
    same = np.array_equal(found, np.ascontiguousarray(flat).view(bits))
    return places if same else None
