"""One bit: on which side of zero a value is, and the mean of each side.

Seide, Fu, Droppo, Li and Yu 2014, "1-bit stochastic gradient descent and its
application to data-parallel distributed training of speech DNNs", section 3.
"""

import struct
from dataclasses import dataclass

import numpy as np
from flwr.common import NDArray

from flower_ext.wire.buckets import (
    bucket_in,
    in_buckets,
    num_buckets,
    precision,
    spread,
)
from flower_ext.wire.value_codes import Buffer, ValueCode

_HEAD = struct.Struct("<I")


@dataclass(frozen=True)
class OneBit(ValueCode):
    """Each value as the mean of those on its side of zero, in its bucket.

    Zeros count as positive. These means leave the least squared error that one bit and
    a threshold of zero can; what is left out sums to zero on each side of each bucket.
    A value takes 1 bit, and a bucket two float32 (of an array of float64: two float64);
    with buckets of 2048 values 1.03 bits a value in all, and 8 bytes for each array.

    It is biased: meant with :class:`~flower_ext.wire.ErrorFeedback`, which that paper
    introduced. The side of a bucket that has a value that is not finite comes back as
    NaN or an infinity.

    Parameters
    ----------
    bucket : int (default: 2048)
        Values of an array, in their order, that share two means.

    Notes
    -----
    Deviation from the paper: a bucket there is a column of a weight matrix, of 2048
    values in its networks. Here the length is the same for all arrays, so that what a
    selection left in a chain has buckets, too.

    Examples
    --------
    >>> x = {"w": np.float32([3, -5, 1, -1])}
    >>> OneBit().decode(OneBit().encode(x), x)
    {'w': array([ 2., -3.,  2., -3.], dtype=float32)}
    """

    bucket: int = 2048

    tag = b"1b"

    def __post_init__(self) -> None:
        object.__setattr__(self, "bucket", bucket_in("bucket", self.bucket))

    @classmethod
    def length(cls, count: int, dtype: np.dtype) -> None:
        """Return None: it depends on the buckets."""

    def encode_values(self, values: NDArray, generator: np.random.Generator) -> bytes:
        """Return the length of buckets, the means of both sides, and the sides."""
        x = in_buckets(values, self.bucket)
        above = x >= 0
        filled = x.size - values.size  # with zeros, behind the last value
        means = []
        for side, filling in ((above, filled), (~above, 0)):
            members = side.sum(axis=1)
            members[-1:] -= filling
            sums = np.where(side, x, 0).sum(axis=1, dtype=np.float64)
            means.append((sums / np.maximum(members, 1)).astype(x.dtype))
        sides = np.packbits(above.reshape(-1)[: values.size])
        head = _HEAD.pack(self.bucket)
        return head + b"".join(y.tobytes() for y in (*means, sides))

    @classmethod
    def decode_values(cls, data: Buffer, count: int, dtype: np.dtype) -> NDArray:
        """Return for each value the mean of its side."""
        if len(data) < _HEAD.size:
            raise ValueError("there is no length of buckets")
        (bucket,) = _HEAD.unpack_from(data)
        if not bucket:
            raise ValueError("buckets of no values")
        wide, buckets = precision(dtype), num_buckets(count, bucket)
        start = _HEAD.size + 2 * buckets * wide.itemsize
        if len(data) != start + (count + 7) // 8:
            raise ValueError(f"{len(data)} bytes for {count} values of one bit")
        above, below = np.frombuffer(data, wide, 2 * buckets, _HEAD.size).reshape(2, -1)
        sides = np.unpackbits(np.frombuffer(data, np.uint8, offset=start), count=count)
        with np.errstate(over="ignore"):
            found = np.where(
                sides, spread(above, bucket, count), spread(below, bucket, count)
            )
            return found.astype(dtype)
