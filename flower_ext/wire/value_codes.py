r"""Codes for the values of arrays: exact, bfloat16 or NF4.

NF4 (Dettmers, Pagnoni, Holtzman and Zettlemoyer 2023, "QLoRA", section 3) keeps four
bits a value: the nearest of 16 quantiles of the normal distribution, times the largest
magnitude of a block of 64 values, which is kept in float32 (half a bit a value more).
"""

import struct
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt
from flwr.common import NDArray

from flower_ext.core.arrays import Arrays, is_averaged
from flower_ext.wire.codec import Decoded, Reader, Sending, Stage, Written

Precision = Literal["exact", "bfloat16", "nf4"]
Buffer = bytes | memoryview

_BLOCK = 64
_LENGTH = struct.Struct("<I")
# The outermost quantile of the QLoRA paper's table.
_OFFSET = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2


class ValueCode(Stage):
    """A codec that codes the floats of each array on their own, flattened.

    A subclass has a ``tag`` and three methods. The arrays are taken in the order of
    their names; integers and flags are exact whatever the code.
    """

    @classmethod
    @abstractmethod
    def length(cls, count: int, dtype: np.dtype) -> int | None:
        """Return the bytes of that many values, None where it depends on them."""

    @abstractmethod
    def encode_values(self, values: NDArray, generator: np.random.Generator) -> bytes:
        """Return the bytes of values, ``(count,)``; of none, too."""

    @classmethod
    @abstractmethod
    def decode_values(cls, data: Buffer, count: int, dtype: np.dtype) -> NDArray:
        """Return the values of bytes that are as many as :meth:`length` says."""

    def write(self, arrays: Arrays, sending: Sending) -> Written:
        """Return the codes of all values."""
        parts: list[bytes] = []
        for name in sorted(arrays):
            code = self if is_averaged(arrays[name]) else Exact()
            data = code.encode_values(arrays[name].reshape(-1), sending.generator)
            if code.length(arrays[name].size, arrays[name].dtype) is None:
                parts.append(_LENGTH.pack(len(data)))
            parts.append(data)
        return Written(parts, sum(x.size for x in arrays.values()))

    @classmethod
    def read(
        cls, reader: Reader, like: Arrays, then: Sequence[type[Stage]] = ()
    ) -> Decoded:
        """Return arrays of all values."""
        if then:
            raise ValueError(f"nothing comes behind {cls.__name__} in a chain")
        arrays = {}
        for name in sorted(like):
            x = like[name]
            code = cls if is_averaged(x) else Exact
            length = code.length(x.size, x.dtype)
            if length is None:
                (length,) = reader.unpack(_LENGTH)
            values = code.decode_values(reader.take(length), x.size, x.dtype)
            arrays[name] = values.reshape(x.shape)
        return Decoded(arrays, sum(x.size for x in like.values()))


@dataclass(frozen=True)
class Exact(ValueCode):
    """The values as they are."""

    tag = b"ex"

    @property
    def lossless(self) -> bool:
        """True."""
        return True

    @classmethod
    def length(cls, count: int, dtype: np.dtype) -> int:
        """Return the size of the array."""
        return count * dtype.itemsize

    def encode_values(self, values: NDArray, generator: np.random.Generator) -> bytes:
        """Return the array's own bytes, the lowest of each number first."""
        return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()

    @classmethod
    def decode_values(cls, data: Buffer, count: int, dtype: np.dtype) -> NDArray:
        """Return a view of the bytes."""
        stored = np.frombuffer(data, dtype.newbyteorder("<"), count)
        return stored.astype(dtype, copy=False)


@dataclass(frozen=True)
class BFloat16(ValueCode):
    """The upper half of a float32: its exponent, and three digits rounded to nearest.

    Coding what was decoded changes nothing.
    """

    tag = b"bf"

    @classmethod
    def length(cls, count: int, dtype: np.dtype) -> int:
        """Return 2 bytes a value."""
        return 2 * count

    def encode_values(self, values: NDArray, generator: np.random.Generator) -> bytes:
        """Return the nearest numbers, to even in a tie."""
        # Here, so that workers whose clients do without torch need not wait for it.
        import torch

        rounded = torch.from_numpy(np.array(values, np.float32)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().astype("<i2", copy=False).tobytes()

    @classmethod
    def decode_values(cls, data: Buffer, count: int, dtype: np.dtype) -> NDArray:
        """Return the numbers in an array's own precision."""
        wide = np.frombuffer(data, "<u2", count).astype(np.uint32) << 16
        with np.errstate(over="ignore", invalid="ignore"):
            return wide.view(np.float32).astype(dtype)


@lru_cache(maxsize=1)
def nf4_levels() -> npt.NDArray[np.float32]:
    """Return the 16 levels of NF4, increasing from -1 to 1; the eighth is 0."""
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(_OFFSET, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(_OFFSET, 0.5, 8)[:-1]]
    levels = np.array(sorted([*negative, 0.0, *positive]))
    return np.asarray(levels / np.abs(levels).max(), np.float32)


def _blocks(count: int) -> int:
    return (count + _BLOCK - 1) // _BLOCK


@dataclass(frozen=True)
class NF4(ValueCode):
    """Four bits a value, and a scale of 32 bits for each block of 64.

    The largest magnitude of a block and zero are exact. A block with a value that is
    not finite comes back as NaN, or with infinities.
    """

    tag = b"n4"

    @classmethod
    def length(cls, count: int, dtype: np.dtype) -> int:
        """Return the bytes of the scales and of the codes."""
        return 4 * _blocks(count) + (count + 1) // 2

    def encode_values(self, values: NDArray, generator: np.random.Generator) -> bytes:
        """Return all scales, and then all codes, two in a byte."""
        padded = np.zeros((_blocks(values.size), _BLOCK), np.float32)
        padded.reshape(-1)[: values.size] = values
        scale = np.abs(padded).max(axis=1)
        levels = nf4_levels()
        with np.errstate(invalid="ignore"):  # an infinity over itself is NaN
            unit = padded / np.where(scale > 0, scale, 1)[:, None]
        codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, unit.reshape(-1))
        codes = codes[: values.size + values.size % 2].astype(np.uint8)
        packed = codes[::2] << 4 | codes[1::2]
        coded: bytes = scale.astype("<f4").tobytes() + packed.tobytes()
        return coded

    @classmethod
    def decode_values(cls, data: Buffer, count: int, dtype: np.dtype) -> NDArray:
        """Return each code's level times the scale of its block."""
        blocks = _blocks(count)
        scale = np.frombuffer(data, "<f4", blocks)
        packed = np.frombuffer(data, np.uint8, offset=4 * blocks)
        codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:count]
        with np.errstate(over="ignore", invalid="ignore"):
            values = nf4_levels()[codes] * np.repeat(scale, _BLOCK)[:count]
            return np.asarray(values, dtype)


#: The codes by the words that strategies take for them.
VALUE_CODES: dict[str, ValueCode] = {
    "exact": Exact(),
    "bfloat16": BFloat16(),
    "nf4": NF4(),
}
