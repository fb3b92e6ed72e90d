r"""TernGrad: the largest magnitude, or zero, at random.

Wen, Xu, Yan, Wu, Wang, Chen and Li 2017, "TernGrad: ternary gradients to reduce
communication in distributed deep learning", equations 1 to 3.
"""

from dataclasses import dataclass

import numpy as np
from flwr.common import NDArray

from flower_ext.wire.buckets import precision
from flower_ext.wire.ternary import pack, packed_length, signs, unpack
from flower_ext.wire.value_codes import Buffer, ValueCode


@dataclass(frozen=True)
class TernGrad(ValueCode):
    r"""Each value as 0, or as the largest magnitude of its array with its sign.

    With :math:`s = \max_i |x_i|` a value becomes

    .. math:: \tilde x_i = s \operatorname{sign}(x_i) b_i, \quad
        P(b_i = 1) = |x_i| / s

    (equations 1 to 3): right on average, with the variance
    :math:`|x_i| (s - |x_i|)`. It takes 1.6 bits a value, five values in a byte, and a
    float32 for each array (a float64 for one of float64).

    An array with a value that is not finite comes back as NaN.

    Notes
    -----
    The variance, :math:`s \|x\|_1 - \|x\|_2^2` in all, is above :math:`\|x\|_2^2` for
    all but short arrays. Being right on average, it needs no
    :class:`~flower_ext.wire.ErrorFeedback`, with which nothing bounds what is left out.

    Deviations from the paper: values are not clipped at 2.5 standard deviations of
    their array before (its section 4), which is a bias; and packing takes 1.6 bits,
    not 2. Scales are not shared among clients, since the server adds up decoded arrays.

    Examples
    --------
    >>> x = {"w": np.float32([2, 0, -2])}
    >>> TernGrad().decode(TernGrad().encode(x), x)
    {'w': array([ 2.,  0., -2.], dtype=float32)}
    """

    tag = b"tg"

    @property
    def unbiased(self) -> bool:
        """True."""
        return True

    @classmethod
    def length(cls, count: int, dtype: np.dtype) -> int:
        """Return the bytes of the scale and of the packed values."""
        return precision(dtype).itemsize + packed_length(count)

    def encode_values(self, values: NDArray, generator: np.random.Generator) -> bytes:
        """Return the scale, and what was drawn."""
        wide = precision(values.dtype)
        magnitude = np.abs(values).astype(wide, copy=False)
        scale = magnitude.max(initial=0)
        draws = generator.random(values.size, wide.newbyteorder("="))
        with np.errstate(invalid="ignore"):  # nothing is below what is not finite
            drawn = draws * scale < magnitude
        packed = pack(signs(drawn, values < 0))
        coded: bytes = np.asarray(scale, wide).tobytes() + packed.tobytes()
        return coded

    @classmethod
    def decode_values(cls, data: Buffer, count: int, dtype: np.dtype) -> NDArray:
        """Return the scale times -1, 0 or 1."""
        wide = precision(dtype)
        scale = np.frombuffer(data, wide, 1)
        with np.errstate(invalid="ignore", over="ignore"):
            signed = unpack(memoryview(data)[wide.itemsize :], count)
            return np.asarray(signed * scale, dtype)
