"""Buckets: runs of values that share a scale."""

import numpy as np
from flwr.common import NDArray

from flower_ext.core.errors import refuse, whole

#: Buckets are at most this long: their length travels in 32 bits.
LONGEST = 2**32 - 1


def bucket_in(name: str, value: object) -> int:
    """Return the length of buckets, checked."""
    length = whole(name, value, 1, "values that share a scale")
    if length > LONGEST:
        refuse(name, value, f"<= {LONGEST}", "one bucket for each array is long enough")
    return length


def precision(dtype: np.dtype) -> np.dtype:
    """Return the dtype of an array's scales: float32, or float64 if it has more."""
    return np.dtype("<f8" if dtype.itemsize > 4 else "<f4")


def num_buckets(count: int, length: int) -> int:
    """Return how many buckets that many values take."""
    return -(-count // length)


def in_buckets(values: NDArray, length: int) -> NDArray:
    """Return values in the precision of their scales, ``(buckets, length)``.

    The last bucket is filled with zeros. No bucket is longer than the values are many.
    """
    wide = precision(values.dtype)
    length = max(min(length, values.size), 1)
    buckets = num_buckets(values.size, length)
    if buckets * length == values.size:
        return values.astype(wide, copy=False).reshape(buckets, length)
    padded = np.zeros((buckets, length), wide)
    padded.reshape(-1)[: values.size] = values
    return padded


def spread(scales: NDArray, length: int, count: int) -> NDArray:
    """Return the scale of each value, ``(count,)``."""
    return np.repeat(scales, max(min(length, count), 1))[:count]
