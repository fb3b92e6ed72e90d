"""The code of permutations: exact, as long as it says, and strict in what it reads."""

import itertools
import math
import zlib

import numpy as np
import pytest

from flower_ext.core.replies import MalformedReply
from flower_ext.wire import Permutation
from flower_ext.wire.codec import PAYLOAD
from flower_ext.wire.permutation import (
    even_steps,
    is_permutation,
    pack,
    packed_length,
    unpack,
)

SIZES = [0, 1, 2, 3, 8, 9, 255, 256, 257, 4096, 65536, 65537, 70001]
# Bytes before the first and the last of an array: the frame of a record, and a byte.
HEAD = 4 + 1 + 2 + 12 + 1


def payload(record):
    return record[PAYLOAD].numpy().tobytes()


def altered(record, change):
    """Change the bytes of a record, and its checksum with them."""
    data = bytearray(payload(record)[4:])
    change(data)
    data = zlib.crc32(data).to_bytes(4, "little") + data
    return type(record)({PAYLOAD: type(record[PAYLOAD])(np.frombuffer(data, np.uint8))})


@pytest.mark.parametrize("size", SIZES)
def test_any_order_comes_back_in_so_many_bits(size):
    places = np.random.default_rng(size).permutation(size)
    data = pack(places)
    np.testing.assert_array_equal(unpack(data, size), places)
    bits = math.ceil(math.log2(size)) if size > 1 else 0
    # Each bit above whole bytes is a row of its own, filled up to a byte.
    assert bits * size <= 8 * len(data) < bits * size + 8 * 7 + 1
    assert len(data) == packed_length(size)


@pytest.mark.parametrize("size", range(5))
def test_every_order_has_bytes_of_its_own(size):
    orders = list(itertools.permutations(range(size)))
    coded = {pack(np.array(order, np.int64)) for order in orders}
    assert len(coded) == len(orders)


@pytest.mark.parametrize(
    ("places", "size"),
    [([0, 1, 1, 3], 4), ([0, 1, 2, 5], 5), ([0, 0], 2), ([3, 1, 2, 3, 4], 5)],
)
def test_a_number_out_of_range_or_repeated_is_refused(places, size):
    wide = np.resize(np.array(places), size)
    assert not is_permutation(wide)
    with pytest.raises(ValueError, match="out of range or repeated"):
        unpack(pack(wide), size)


def test_six_is_no_place_of_five():
    # Three rows of bits; of the places 0 to 7 those of 0, 1, 2, 3 and 6 are kept.
    data = np.frombuffer(pack(np.array([0, 1, 2, 3, 6, 4, 5, 7])), np.uint8)
    rows = np.unpackbits(data).reshape(3, 8)
    rows[:, 5:] = 0
    with pytest.raises(ValueError, match="out of range or repeated"):
        unpack(np.packbits(rows, axis=1).tobytes(), 5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data + b"\0", "bytes, must be"),
        (lambda data: data[:-1], "bytes, must be"),
        (lambda data: data[:-1] + bytes([data[-1] | 1]), "behind the end"),
    ],
)
def test_bytes_of_another_length_or_end_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        unpack(change(pack(np.arange(300)[::-1])), 300)


@pytest.mark.parametrize(
    ("dtype", "ends"),
    [
        ("f4", (-1 / 8, 1 / 8)),
        ("f4", (-0.07216878235340118, 0.07216878235340118)),
        ("f8", (1e-3, 2.5)),
        ("f2", (-1.0, 1.0)),
        ("i4", (0, 999)),
        ("u2", (7, 7 + 3 * 999)),
        ("i8", (-999, 0)),
    ],
)
def test_even_steps_in_any_order_take_the_order_only(dtype, ends):
    dtype = np.dtype(dtype)
    first, last = np.array(ends, dtype).tolist()
    order = np.random.default_rng(1).permutation(1000)
    x = {"w": even_steps(order, first, last, dtype).reshape(20, 50)}
    record = Permutation().encode(x)
    assert len(payload(record)) == HEAD + 2 * dtype.itemsize + packed_length(1000)
    found = Permutation().decode(record, x)["w"]
    assert found.dtype == dtype and found.tobytes() == x["w"].tobytes()


@pytest.mark.parametrize(
    "x",
    [
        np.float32([0.0, 1.0, 1.0, 2.0]),
        np.float32([0.0, 1.0, 2.5]),
        np.float32([-1.0, -0.0, 1.0]),
        np.float32([0.0, np.nan, 1.0]),
        np.float32([0.0, np.inf]),
        np.float64([-1.5e308, 1.5e308]),
        np.zeros(9, np.float32),
        np.uint64([2**64 - 1, 0]),
        np.array([True, False]),
        np.array([5]),
    ],
    ids=str,
)
def test_all_else_is_as_it_was(x):
    record = Permutation().encode({"w": x})
    found = Permutation().decode(record, {"w": x})["w"]
    assert found.tobytes() == x.tobytes()


def test_every_altered_byte_is_refused_or_another_order():
    x = {"w": np.random.default_rng(2).permutation(37).astype(np.int32)}
    record = Permutation().encode(x)
    refused = 0
    for place in range(HEAD - 5, len(payload(record)) - 4):
        for bit in range(8):

            def flip(data, place=place, bit=bit):
                data[place] ^= 1 << bit

            try:
                found = Permutation().decode(altered(record, flip), x)["w"]
            except MalformedReply:
                refused += 1
            else:  # of the ends, or of numbers that were written as they are
                assert place < HEAD + 8 - 4 and found.shape == (37,)
    assert refused > 8 * packed_length(37)


def test_a_longer_record_takes_no_more_memory():
    x = {"w": np.arange(10)}
    long = altered(Permutation().encode(x), lambda data: data.extend(bytes(10_000)))
    with pytest.raises(MalformedReply, match="bytes too many"):
        Permutation().decode(long, x)
