r"""Codes for the values of a sparse array: exact, bfloat16 or NF4.

NF4 (Dettmers, Pagnoni, Holtzman and Zettlemoyer 2023, "QLoRA", section 3) keeps four
bits a value: the nearest of 16 quantiles of the normal distribution, times the largest
magnitude of a block of 64 values, which is kept in float32 (half a bit a value more).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from flwr.common import NDArray

Precision = Literal["exact", "bfloat16", "nf4"]
Buffer = bytes | memoryview

_BLOCK = 64
# The outermost quantile of the QLoRA paper's table.
_OFFSET = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2


@dataclass(frozen=True)
class ValueCode:
    """One code; an array's values are coded on their own.

    Parameters
    ----------
    length : callable
        ``(count, dtype) -> bytes``.
    encode : callable
        ``values -> bytes``.
    decode : callable
        ``(data, count, dtype) -> values``; ``data`` has that length.
    """

    length: Callable[[int, np.dtype], int]
    encode: Callable[[NDArray], bytes]
    decode: Callable[[Buffer, int, np.dtype], NDArray]


def _encode_exact(values: NDArray) -> bytes:
    return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


def _decode_exact(data: Buffer, count: int, dtype: np.dtype) -> NDArray:
    stored = np.frombuffer(data, dtype.newbyteorder("<"), count)
    return stored.astype(dtype, copy=False)


def _encode_bfloat16(values: NDArray) -> bytes:
    rounded = torch.from_numpy(np.array(values, np.float32)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().astype("<i2", copy=False).tobytes()


def _decode_bfloat16(data: Buffer, count: int, dtype: np.dtype) -> NDArray:
    wide = np.frombuffer(data, "<u2", count).astype(np.uint32) << 16
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


def _encode_nf4(values: NDArray) -> bytes:
    padded = np.zeros((_blocks(values.size), _BLOCK), np.float32)
    padded.reshape(-1)[: values.size] = values
    scale = np.abs(padded).max(axis=1)
    levels = nf4_levels()
    with np.errstate(invalid="ignore"):  # an infinity is not encoded but kept as NaN
        unit = padded / np.where(scale > 0, scale, 1)[:, None]
    codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, unit.reshape(-1))
    codes = codes[: values.size + values.size % 2].astype(np.uint8)
    packed = codes[::2] << 4 | codes[1::2]
    coded: bytes = scale.astype("<f4").tobytes() + packed.tobytes()
    return coded


def _decode_nf4(data: Buffer, count: int, dtype: np.dtype) -> NDArray:
    blocks = _blocks(count)
    scale = np.frombuffer(data, "<f4", blocks)
    packed = np.frombuffer(data, np.uint8, offset=4 * blocks)
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:count]
    with np.errstate(invalid="ignore"):
        values = nf4_levels()[codes] * np.repeat(scale, _BLOCK)[:count]
    return np.asarray(values, dtype)


#: All codes, by name. Their order is part of the wire format.
VALUE_CODES: dict[str, ValueCode] = {
    "exact": ValueCode(
        lambda count, dtype: count * dtype.itemsize, _encode_exact, _decode_exact
    ),
    "bfloat16": ValueCode(
        lambda count, dtype: 2 * count, _encode_bfloat16, _decode_bfloat16
    ),
    "nf4": ValueCode(
        lambda count, dtype: 4 * _blocks(count) + (count + 1) // 2,
        _encode_nf4,
        _decode_nf4,
    ),
}
