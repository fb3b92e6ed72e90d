r"""EDEN and DRIVE: values turned at random, so that a bit or a few are enough for each.

Vargaftik, Ben-Basat, Portnoy, Mendelson, Ben-Itzhak and Mitzenmacher 2021 ("DRIVE:
One-bit Distributed Mean Estimation", one bit) and 2022 ("EDEN: Communication-Efficient
and Robust Distributed Mean Estimation for Federated Learning", any number of bits).
Whatever a vector was, turned at random its coordinates are about normal, so that one
quantiser, that of Lloyd and Max for the normal distribution, serves all vectors. With
:math:`R` the rotation, :math:`Q` the quantiser of the coordinates at variance 1 and
:math:`S` a scale, a block of :math:`d` values comes back as

.. math:: \hat x = S R^T Q(\sqrt d R x / |x|)

Each array is turned on its own, in blocks of 4096 values, the rest of it in powers of
two, and what is left below 64 by itself. The error is a share of the energy of a
block: arrays that were turned together would have that of the largest among them.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil, floor
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from flwr.common import NDArray

from flower_ext.core.arrays import Arrays, is_averaged
from flower_ext.core.errors import at_least, refuse, yes_or_no
from flower_ext.wire.codec import Decoded, Reader, Sending, Stage, Written
from flower_ext.wire.value_codes import Exact

Floats = npt.NDArray[np.float32]

_LEAST, _MOST = 1 / 64, 8
# Matrices of 64 by 64: larger ones OpenBLAS divides among threads, which takes a
# hundred times as long where other processes have the cores.
_WIDTH, _BLOCK = 64, 64 * 64
# Blocks that are turned at once: 1 MiB, which stays in the processor's cache.
_AT_ONCE = 64
# Of fewer coordinates the sum of magnitudes, by which a block is scaled, says little.
_FEWEST = 32
_HEAD = struct.Struct("<Qd")


@dataclass(frozen=True)
class EDEN(Stage):
    r"""A few bits a value, and a scale of 32 bits for each block of 4096.

    Unbiased, the squared error of a decoded vector is expected to be :math:`D/(1 - D)`
    of its squared norm, with :math:`D` that of the quantiser: 0.571, 0.133, 0.0358 and
    0.00959 at one to four bits. The errors of clients are independent: that of their
    mean is smaller by their number. A block of zeros is exact; one that holds a value
    that is not finite comes back as NaN.

    Parameters
    ----------
    bits : float (default: 1)
        Bits a value, from 1/64 to 8. Of a number that is not whole, some coordinates
        have one bit more than the others; below 1, the others have none.
    unbiased : bool (default: True)
        Whether the mean over the draws is what was encoded, which serves a mean of many
        clients. Otherwise the scale is that of least error, :math:`D`, which serves one
        sender and :class:`~flower_ext.wire.ErrorFeedback`. The latter needs it below
        0.8 bits, where :math:`D/(1 - D)` is above 1: what is left out would grow.

    Notes
    -----
    The paper proves its claims for rotations that are drawn uniformly, and computes
    with a Hadamard transform after random signs. That alone leaves a vector of few
    large coordinates far from normal: at one bit, 3 and 1 among zeros always come back
    as 10/3 and 0. Here signs and transform come twice, and in place of its last six
    steps, those within each 64 values, the second transform has a rotation that is
    drawn uniformly; so what is no longer than 64 values is turned uniformly.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal(10_000, np.float32)
    >>> codec = EDEN(bits=2)
    >>> record = codec.encode({"w": x})
    >>> error = codec.decode(record, {"w": x})["w"] - x
    >>> round(float((error**2).sum() / (x**2).sum()), 2)
    0.13
    """

    bits: float = 1
    unbiased: bool = True

    tag = b"ed"

    def __post_init__(self) -> None:
        if at_least("bits", self.bits, _LEAST) > _MOST:
            refuse("bits", self.bits, f"at most {_MOST}", "BFloat16() has 16")
        yes_or_no("unbiased", self.unbiased)

    def write(self, arrays: Arrays, sending: Sending) -> Written:
        """Return seed and bits, and of each block its scale and its codes."""
        seed = int.from_bytes(sending.generator.bytes(8), "little")
        rotation = _Rotation(seed)
        parts = [_HEAD.pack(seed, self.bits)]
        for name in sorted(arrays):
            values = arrays[name].reshape(-1)
            if not is_averaged(values):
                parts.append(Exact().encode_values(values, sending.generator))
                continue
            at = 0
            for blocks, size in _pieces(values.size):
                piece = values[at : at + blocks * size].reshape(blocks, size)
                parts += _encode(piece, rotation, self.bits, self.unbiased)
                at += blocks * size
        return Written(parts, sum(x.size for x in arrays.values()))

    @classmethod
    def read(
        cls, reader: Reader, like: Arrays, then: Sequence[type[Stage]] = ()
    ) -> Decoded:
        """Return arrays of all values."""
        if then:
            raise ValueError(f"nothing comes behind {cls.__name__} in a chain")
        seed, bits = reader.unpack(_HEAD)
        if not _LEAST <= bits <= _MOST:
            raise ValueError(f"{bits} bits, must be {_LEAST} to {_MOST}")
        rotation = _Rotation(seed)
        arrays = {}
        for name in sorted(like):
            x = like[name]
            if is_averaged(x):
                values = np.empty(x.size, x.dtype)
                at = 0
                for blocks, size in _pieces(x.size):
                    piece = _decode(reader, rotation, bits, blocks, size)
                    with np.errstate(over="ignore"):
                        values[at : at + blocks * size] = piece.reshape(-1)
                    at += blocks * size
            else:
                data = reader.take(x.size * x.dtype.itemsize)
                values = Exact.decode_values(data, x.size, x.dtype)
            arrays[name] = values.reshape(x.shape)
        return Decoded(arrays, sum(x.size for x in like.values()))


@dataclass(frozen=True)
class DRIVE(EDEN):
    r"""One bit a value, the sign of the turned coordinate: :class:`EDEN` at one bit.

    The scale is the paper's :math:`|x|^2 / |Rx|_1`, or :math:`|Rx|_1 / d` for the least
    error.

    Parameters
    ----------
    unbiased : bool (default: True)
        As of :class:`EDEN`: the squared error is 0.571 of the squared norm, otherwise
        0.363, of which error feedback makes up sooner.
    """

    bits: float = field(default=1, init=False)


@lru_cache
def lloyd_max(bits: int) -> npt.NDArray[np.float64]:
    """Return the levels of least squared error for a standard normal number.

    Each level is the mean of the numbers that are nearer to it than to others; Newton's
    method finds where all are. Levels are symmetric: half of them are computed, those
    below zero, where probabilities are exact however small.

    Parameters
    ----------
    bits : int
        0 or more.

    Returns
    -------
    ndarray
        Increasing, ``(2**bits,)``.
    """
    if bits == 0:
        return np.zeros(1)
    normal, half = NormalDist(), 2 ** (bits - 1)
    # The density of many levels is the cube root of the numbers' own (Panter and Dite).
    start = [3**0.5 * normal.inv_cdf((i + 0.5) / (2 * half)) for i in range(half)]
    levels, step = np.array(start), np.ones(half)
    while np.abs(step).max() > 1e-10:
        edges = np.array([-40, *(levels[1:] + levels[:-1]) / 2, 0])
        density = np.array([normal.pdf(x) for x in edges])
        mass = np.diff([normal.cdf(x) for x in edges])
        means = -np.diff(density) / mass
        # How the means follow the edges, which are half of the levels beside them.
        left = density[:-1] * (means - edges[:-1]) / mass / 2
        right = density[1:] * (edges[1:] - means) / mass / 2
        right[-1] = 0  # zero stays where it is
        slope = np.diag(left + right) + np.diag(left[1:], -1) + np.diag(right[:-1], 1)
        step = np.linalg.solve(np.eye(half) - slope, means - levels)
        levels = levels + step
    return np.concatenate([levels, -levels[::-1]])


class _Rotation:
    """Turns blocks, one after the other, as both ends draw it from a seed.

    Only what NumPy promises to keep over its releases is drawn: raw bits.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._signs = np.random.PCG64(seed)
        self._turns: dict[int, Floats] = {}

    def forth(self, x: Floats) -> Floats:
        """Turn blocks ``(blocks, size)``."""
        across, flat, turn, (first, second) = self._draw(*x.shape)
        y = across @ (x.reshape(first.shape) * first) @ flat
        return np.asarray(across @ (y * second) @ turn).reshape(x.shape)

    def back(self, x: Floats) -> Floats:
        """Undo what :meth:`forth` did to the blocks of the same place."""
        across, flat, turn, (first, second) = self._draw(*x.shape)
        y = across @ (x.reshape(first.shape) @ turn.T) * second
        return np.asarray(across @ (y @ flat) * first).reshape(x.shape)

    def _draw(self, blocks: int, size: int) -> tuple[Floats, Floats, Floats, Floats]:
        """Return what turns columns and, first and last, rows; and signs for both."""
        width = min(size, _WIDTH)
        rows = size // width
        if width not in self._turns:
            bits = np.random.PCG64([self._seed, width])
            self._turns[width] = _uniform_rotation(bits, width)
        count = 2 * blocks * size
        words = self._signs.random_raw(ceil(count / 64)).astype("<u8")
        signs = 1 - 2 * np.unpackbits(words.view(np.uint8), count=count).astype("f4")
        flat = _hadamard(width) if width == _WIDTH else np.eye(width, dtype="f4")
        shape = (2, blocks, rows, width)
        return _hadamard(rows), flat, self._turns[width], signs.reshape(shape)


def _uniform_rotation(bits: np.random.PCG64, size: int) -> Floats:
    """Return an orthogonal matrix, ``(size, size)``, of the uniform kind."""
    words = bits.random_raw(ceil(size * size / 2)).astype("<u8").view("<u4")
    uniform = (words.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    length, angle = np.sqrt(-2 * np.log(uniform[::2])), 2 * np.pi * uniform[1::2]
    normal = np.concatenate([length * np.cos(angle), length * np.sin(angle)])
    del words, uniform, length, angle
    turn, triangle = np.linalg.qr(normal[: size * size].reshape(size, size))
    # Signs are a matter of the QR routine: both ends must have the same ones.
    turn *= np.sign(np.diagonal(triangle))
    return np.asarray(turn, np.float32)


@lru_cache
def _hadamard(size: int) -> Floats:
    """Return the orthogonal, symmetric matrix of a power of two."""
    if size == 1:
        return np.ones((1, 1), np.float32)
    half = _hadamard(size // 2) * np.float32(0.5**0.5)
    return np.block([[half, half], [half, -half]])


def _pieces(count: int) -> list[tuple[int, int]]:
    """Return how an array is cut: numbers of blocks, and their sizes."""
    whole = count // _BLOCK
    pieces = [(min(_AT_ONCE, whole - i), _BLOCK) for i in range(0, whole, _AT_ONCE)]
    size = _BLOCK // 2
    while size >= _WIDTH:
        pieces += [(1, size)] * bool(count & size)
        size //= 2
    return pieces + [(1, count % _WIDTH)] * bool(count % _WIDTH)


def _spans(bits: float, size: int) -> list[tuple[slice, int]]:
    """Return which coordinates of a block have how many bits."""
    low = floor(bits)
    more = ceil((bits - low) * size)
    if low == 0:
        more = min(size, max(more, _FEWEST))
    spans = [(slice(0, more), low + 1), (slice(more, size), low)]
    return [(span, each) for span, each in spans if span.start < span.stop]


def _encode(
    values: NDArray, rotation: _Rotation, bits: float, unbiased: bool
) -> list[bytes]:
    """Return the scales of blocks ``(blocks, size)``, and their codes."""
    size = values.shape[1]
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        x = values.astype(np.float32)
        # At most 1, so that no sum of squares is too large or too small.
        largest = np.abs(x).max(axis=1)
        usable = np.isfinite(largest) & (largest > 0)
        x /= np.where(usable, largest, 1)[:, None]
        z = rotation.forth(x)
        root = np.sqrt(np.einsum("ij,ij->i", z, z) / size)
        z /= np.where(usable, root, 1)[:, None]
        coded = []
        inner, square = np.zeros(len(z)), np.zeros(len(z))
        for span, each in _spans(bits, size):
            codes = _nearest(z[:, span], each)
            q = np.take(lloyd_max(each).astype(np.float32), codes)
            inner += np.einsum("ij,ij->i", z[:, span], q)
            square += np.einsum("ij,ij->i", q, q)
            planes = [codes >> i & 1 for i in range(each)]
            coded.append(np.packbits(np.array(planes, np.uint8)).tobytes())
        scale = largest * root.astype(np.float64)
        scale *= size / inner if unbiased else inner / square
        scale = np.where(usable, scale, largest * 0)  # zero, or NaN
        return [scale.astype("<f4").tobytes(), *coded]


def _decode(
    reader: Reader, rotation: _Rotation, bits: float, blocks: int, size: int
) -> Floats:
    """Return blocks ``(blocks, size)``."""
    scale = np.frombuffer(reader.take(4 * blocks), "<f4").astype(np.float32)
    q = np.empty((blocks, size), np.float32)
    for span, each in _spans(bits, size):
        shape = (blocks, span.stop - span.start)
        count = each * shape[0] * shape[1]
        data = np.frombuffer(reader.take(ceil(count / 8)), np.uint8)
        planes = np.unpackbits(data, count=count).reshape(each, *shape)
        codes = np.zeros(shape, np.uint8)
        for i, plane in enumerate(planes):
            codes |= plane << np.uint8(i)
        q[:, span] = np.take(lloyd_max(each).astype(np.float32), codes)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(rotation.back(q) * scale[:, None])


def _nearest(z: Floats, bits: int) -> npt.NDArray[np.uint8]:
    """Return the number of the nearest level of each coordinate."""
    levels = lloyd_max(bits).astype(np.float32)
    codes = np.zeros(z.shape, np.uint8)
    for edge in (levels[1:] + levels[:-1]) / 2:
        codes += z > edge  # in cache, many times faster than a search at few bits
    return codes
