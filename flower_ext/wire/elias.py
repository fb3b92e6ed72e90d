r"""Elias's gamma code of many integers at once (Elias 1975, "Universal codeword sets").

The code of ``n >= 1`` has :math:`2 \lfloor \log_2 n \rfloor + 1` bits: whether ``n`` is
above 1, and if so its lowest bit and the code of ``n // 2``. Here the first bits of all
integers come first, then the second bits of those that have any, and so on. The bits
are those of one code behind the other, in another order, in which each step of coding
and of decoding is one operation on arrays::

    n = 1, 6, 2          above 1?   0 1 1     low bits   0 0
                         of 3, 1:   1 0                  1
                         of 1:      0
"""

import numpy as np
import numpy.typing as npt

Buffer = bytes | memoryview
Bits = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]


class BitWriter:
    """Collects bits, and packs them into bytes."""

    def __init__(self) -> None:
        self._parts: list[Bits] = []

    def flags(self, bits: Bits) -> None:
        """Write bits as they are."""
        self._parts.append(bits)

    def gamma(self, integers: Integers) -> None:
        """Write integers, each at least 1."""
        while integers.size:
            more = integers > 1
            self.flags(more)
            integers = integers[more]
            self.flags((integers & 1).astype(np.bool_))
            integers = integers >> 1

    def packed(self) -> bytes:
        """Return all bits; zeros fill the last byte."""
        return np.packbits(
            np.concatenate([np.zeros(0, np.bool_), *self._parts])
        ).tobytes()


class BitReader:
    """Reads what a :class:`BitWriter` wrote, in memory for what is asked for."""

    def __init__(self, data: Buffer) -> None:
        self._data = np.frombuffer(data, np.uint8)
        self._at = 0

    def flags(self, count: int) -> Bits:
        """Return the next bits."""
        first, skipped = divmod(self._at, 8)
        end = skipped + count
        self._at += count
        if self._at > 8 * self._data.size:
            raise ValueError("bits are cut off")
        part = self._data[first : first + (end + 7) // 8]
        return np.unpackbits(part, count=end).view(np.bool_)[skipped:]

    def gamma(self, count: int, below: int) -> Integers:
        """Return the next integers; a ``ValueError`` unless all are below a bound."""
        halvings: list[tuple[Bits, Bits]] = []
        left = count
        while left:
            if below >> len(halvings) == 0:
                raise ValueError(f"an integer is not below {below}")
            more = self.flags(left)
            left = int(np.count_nonzero(more))
            halvings.append((more, self.flags(left)))
        integers = np.zeros(0, np.int64)
        for more, low in reversed(halvings):
            whole = np.ones(more.size, np.int64)
            whole[more] = 2 * integers + low
            integers = whole
        if integers.size and integers.max() >= below:
            raise ValueError(f"an integer is not below {below}")
        return integers

    def end(self) -> None:
        """Raise ``ValueError`` unless nothing but the last byte's filling is left."""
        left = 8 * self._data.size - self._at
        if left >= 8 or self.flags(left).any():
            raise ValueError("bits behind the end")
