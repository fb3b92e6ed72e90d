r"""An entropy coder of many integers at once, with a histogram that goes with them.

The range variant of asymmetric numeral systems (Duda 2013, "Asymmetric numeral
systems", arXiv:1311.2540): a number :math:`x` takes up a symbol of the frequency
:math:`f` of :math:`2^{14}`, below which lie :math:`c` of others, as

.. math:: x' = 2^{14} \lfloor x / f \rfloor + c + x \bmod f,

and gives it back by the lowest 14 bits. It grows by :math:`\log_2(2^{14}/f)` bits, the
symbol's share of the entropy, and is kept in 32 bits by taking 16 of them away.

Here many such numbers, the lanes, take up symbols side by side, so that each step is
one operation on arrays: lane :math:`i` of :math:`n` has the symbols :math:`i, i + n,
i + 2n, \ldots`. Integers from 0 to :math:`2^{53} - 1` have symbols of their own up to
31; of larger ones the five leading bits and their place are the symbol, and the others
follow as they are: within a symbol all are about alike.
"""

import struct

import numpy as np
import numpy.typing as npt

from flower_ext.wire.codec import Reader
from flower_ext.wire.elias import BitReader, BitWriter, Integers

Symbols = npt.NDArray[np.uint16]
States = npt.NDArray[np.uint32]

# A lane is at least this between symbols.
_LOW = 1 << 16
_PRECISION = 14
_TOTAL = 1 << _PRECISION
# How many lanes, words and symbols there are.
_HEAD = struct.Struct("<IIH")
# A lane takes 32 bits of which it uses half: for so many bits that it does not matter.
_BITS_A_LANE, _MOST_LANES = 1 << 11, 1 << 12
# No lane has more symbols: what is read takes a time that their number accounts for.
_LONGEST = 1 << 13
_MANTISSA = 4
# Of the largest integer, which has 53 bits.
_MOST_SYMBOLS = 800


def encode(integers: Integers, bits: BitWriter) -> bytes:
    """Return the code of integers in [0, 2**53).

    Parameters
    ----------
    integers : ndarray of int64
        ``(count,)``, at least one.
    bits : BitWriter
        Takes the histogram and the lower bits of large integers.
    """
    symbols, places = _symbols(integers)
    counts = np.bincount(symbols)
    frequencies = _frequencies(counts)
    states, words = _absorb(symbols, frequencies, _lanes(counts))
    bits.gamma(frequencies.astype(np.int64) + 1)
    lower = integers[places]
    shifts = _shifts(symbols[places])
    for shift in range(int(shifts.max(initial=0))):
        bits.flags((lower[shifts > shift] >> shift & 1).astype(np.bool_))
    head = _HEAD.pack(len(states), len(words), len(frequencies))
    return head + states.astype("<u4").tobytes() + words.tobytes()


class Coded:
    """What :func:`encode` returned, as the next bytes of a reader.

    Parameters
    ----------
    reader : Reader
        Of the bytes.
    count : int
        How many integers there are.
    """

    def __init__(self, reader: Reader, count: int) -> None:
        lanes, words, self._symbols = reader.unpack(_HEAD)
        if not lanes <= count <= lanes * _LONGEST or self._symbols > _MOST_SYMBOLS:
            raise ValueError(f"{count} of {self._symbols} symbols in {lanes} lanes")
        self._count = count
        self._states = np.frombuffer(reader.take(4 * lanes), "<u4")
        self._words = np.frombuffer(reader.take(2 * words), "<u2")

    def integers(self, bits: BitReader, below: int) -> Integers:
        """Return the integers; a ``ValueError`` unless all are below a bound."""
        frequencies = bits.gamma(self._symbols, _TOTAL + 2) - 1
        if frequencies.sum() != _TOTAL:
            raise ValueError(f"frequencies of {frequencies.sum()}, must be {_TOTAL}")
        symbols = _release(self._states, self._words, frequencies, self._count)
        integers = symbols.astype(np.int64)
        places = np.flatnonzero(symbols >= 2 << _MANTISSA)
        shifts = _shifts(symbols[places])
        large = integers[places] - (shifts << _MANTISSA) << shifts
        for shift in range(int(shifts.max(initial=0))):
            has = shifts > shift
            large[has] |= bits.flags(int(has.sum())).astype(np.int64) << shift
        integers[places] = large
        if integers.max(initial=0) >= below:
            raise ValueError(f"an integer is not below {below}")
        return integers


def _symbols(integers: Integers) -> tuple[Symbols, Integers]:
    """Return the symbols of integers, and the places of those that have more bits."""
    places = np.flatnonzero(integers >= 2 << _MANTISSA)
    large = integers[places]
    shifts = np.frexp(large)[1].astype(np.int64) - (_MANTISSA + 1)
    symbols = integers.astype(np.uint16)
    symbols[places] = (shifts << _MANTISSA) + (large >> shifts)
    return symbols, places


def _shifts(symbols: Symbols) -> Integers:
    """Return how many bits follow each symbol of a large integer."""
    return (symbols >> _MANTISSA).astype(np.int64) - 1


def _frequencies(counts: Integers) -> Integers:
    """Return shares of ``2**14``, none of which is zero unless a count is."""
    used = counts > 0
    free = _TOTAL - int(used.sum())
    shares = counts * (free / counts.sum())
    frequencies: Integers = shares.astype(np.int64)
    left = free - int(frequencies.sum())
    # The rest goes to those that rounding down took most of.
    order = np.argsort(frequencies - shares, kind="stable")
    frequencies[order[:left]] += 1
    frequencies += used
    return frequencies


def _lanes(counts: Integers) -> int:
    """Return how many lanes take up symbols of these counts."""
    count = int(counts.sum())
    own = counts[counts > 0]
    bits = float((own * np.log2(count / own)).sum())
    few = -(-count // _LONGEST)
    return max(min(int(bits) // _BITS_A_LANE, _MOST_LANES, count), few)


def _ranges(frequencies: Integers) -> tuple[States, States]:
    """Return how many of ``2**14`` numbers each symbol has, and the first of them."""
    starts = np.cumsum(frequencies) - frequencies
    return frequencies.astype(np.uint32), starts.astype(np.uint32)


def _absorb(
    symbols: Symbols, frequencies: Integers, lanes: int
) -> tuple[States, npt.NDArray[np.uint16]]:
    """Return the lanes after all symbols, and the words that were taken away."""
    share, start = _ranges(frequencies)
    states = np.full(lanes, _LOW, np.uint32)
    words = []
    for row in reversed(range(0, len(symbols), lanes)):
        some = symbols[row : row + lanes]
        x, f = states[: len(some)], share[some]
        full = x >> (32 - _PRECISION) >= f
        words.append(x[full].astype("<u2"))
        np.right_shift(x, 16, out=x, where=full)
        quotient = x // f
        x -= quotient * f
        x += start[some]
        x += quotient << _PRECISION
    return states, np.concatenate(words[::-1])


def _release(
    states: States, words: npt.NDArray[np.uint16], frequencies: Integers, count: int
) -> Symbols:
    """Return the symbols that lanes took up, the last one first.

    Raises
    ------
    ValueError
        Unless lanes and words are just those of so many symbols.
    """
    symbol = np.repeat(np.arange(len(frequencies), dtype=np.uint16), frequencies)
    share, start = _ranges(frequencies)
    x, lanes, at = states.astype(np.uint32), len(states), 0
    symbols = np.empty(count, np.uint16)
    for row in range(0, count, lanes):
        y = x[: count - row]
        slots = y & np.uint32(_TOTAL - 1)
        symbols[row : row + lanes] = some = symbol[slots]
        y >>= _PRECISION
        y *= share[some]
        y += slots
        y -= start[some]
        empty = np.flatnonzero(y < _LOW)
        more = words[at : at + len(empty)]
        if len(more) < len(empty):
            raise ValueError("words are cut off")
        y[empty] = y[empty] << 16 | more
        at += len(empty)
    if at < len(words) or (x != _LOW).any():
        raise ValueError("what is left is no beginning")
    return symbols
