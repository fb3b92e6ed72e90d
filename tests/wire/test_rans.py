"""The entropy coder: integers come back, in few bits more than their entropy."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flower_ext.testing import check_codec
from flower_ext.wire import Sending, UniversalCode, rans, universal
from flower_ext.wire.codec import Reader
from flower_ext.wire.elias import BitReader, BitWriter

LARGEST = 2**53 - 1


def encode(integers):
    bits = BitWriter()
    data = rans.encode(np.array(integers, np.int64), bits)
    return data, bits.packed()


def decode(data, lower, count, below=LARGEST + 1):
    reader = Reader(memoryview(data))
    coded = rans.Coded(reader, count)
    assert not reader.left
    bits = BitReader(lower)
    found = coded.integers(bits, below)
    bits.end()
    return found


integers = st.one_of(
    st.integers(0, 3), st.integers(0, 100), st.integers(0, LARGEST), st.just(LARGEST)
)


@settings(derandomize=True, deadline=None)
@given(st.lists(integers, min_size=1, max_size=300))
def test_integers_come_back(values):
    data, lower = encode(values)
    assert decode(data, lower, len(values)).tolist() == values


@pytest.mark.parametrize("count", [1, 8191, 8192, 8193, 100_000])
@pytest.mark.parametrize("top", [1, 2, 40, 2**20])
def test_integers_of_many_lanes_come_back(count, top):
    values = np.random.default_rng(0).integers(0, top, count)
    data, lower = encode(values)
    assert np.array_equal(decode(data, lower, count), values)


def test_a_coder_that_works_integer_by_integer_reads_them():
    """Of one lane: symbols leave a whole number, which is filled up from words."""
    rng = np.random.default_rng(1)
    values = np.minimum(rng.geometric(0.4, 400) - 1, 31)
    data, lower = encode(values)
    lanes, words, symbols = struct.unpack("<IIH", data[:10])
    assert (lanes, symbols) == (1, values.max() + 1)
    (x,) = struct.unpack("<I", data[10:14])
    coming = iter(struct.unpack(f"<{words}H", data[14:]))
    shares = (BitReader(lower).gamma(symbols, 2**15) - 1).tolist()
    starts = [sum(shares[:i]) for i in range(symbols)]
    found = []
    for _ in values:
        slot = x % 2**14
        symbol = max(i for i in range(symbols) if shares[i] and starts[i] <= slot)
        found.append(symbol)
        x = shares[symbol] * (x // 2**14) + slot - starts[symbol]
        if x < 2**16:
            x = x * 2**16 + next(coming)
    assert found == values.tolist()
    assert x == 2**16 and next(coming, None) is None


def distributions():
    rng = np.random.default_rng(2)
    size = 200_000
    return {
        "geometric": rng.geometric(0.3, size) - 1,
        "rarely anything": (rng.random(size) < 0.003).astype(np.int64),
        "alike": rng.integers(0, 24, size),
        "two": rng.choice([3, 17], size, p=[0.9, 0.1]),
        "large": np.abs(rng.laplace(0, 2000, size)).astype(np.int64),
        "normal": np.abs(rng.normal(0, 300, size)).astype(np.int64),
    }


@pytest.mark.parametrize("name", distributions())
def test_they_take_little_more_than_their_entropy(name):
    values = distributions()[name]
    data, lower = encode(values)
    _, often = np.unique(values, return_counts=True)
    entropy = float((often * np.log2(len(values) / often)).sum())
    taken = 8 * (len(data) + len(lower))
    # The sample's own entropy is below that of a smooth distribution, by half a bit
    # for each of its values.
    assert entropy < taken < 1.015 * entropy + len(often) + 700


def test_one_and_the_same_takes_nothing():
    data, lower = encode(np.full(8000, 5))
    assert len(data) + len(lower) < 10 + 4 + 8
    assert decode(data, lower, 8000).tolist() == [5] * 8000


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=800).filter(any))
def test_frequencies_are_shares_of_all(counts):
    counts = np.array(counts, np.int64)
    found = rans._frequencies(counts)
    assert found.sum() == 2**14
    assert ((found > 0) == (counts > 0)).all()
    used = counts > 0
    shares = counts / counts.sum() * (2**14 - used.sum())
    assert (np.abs(found - used - shares) < 1).all()


# What nobody wrote -------------------------------------------------------------------

VALUES = np.arange(60) % 7


def altered(at, value, form="<I"):
    data, lower = encode(VALUES)
    data = bytearray(data)
    struct.pack_into(form, data, at, value)
    return bytes(data), lower


@pytest.mark.parametrize(
    ("data", "lower", "count", "reason"),
    [
        (*altered(0, 0), 60, "in 0 lanes"),
        (*altered(0, 61), 60, "in 61 lanes"),
        (*encode(VALUES), 8193, "8193 of 7 symbols in 1 lanes"),
        (*altered(8, 801, "<H"), 60, "801 symbols"),
        (*altered(8, 0, "<H"), 60, "frequencies of 0"),
        (*altered(8, 6, "<H"), 60, "frequencies of"),
        (*altered(0, 2), 60, "cut off"),
        (*altered(4, 1000), 60, "cut off"),
        (*altered(10, 0), 60, r"cut off|no beginning"),
        (*altered(10, 2**32 - 1), 60, r"cut off|no beginning"),
        (*altered(14, 7, "<H"), 60, r"cut off|no beginning"),
        (*encode(VALUES), 59, r"cut off|no beginning"),
        (*encode(VALUES), 61, r"cut off|no beginning"),
        (encode(VALUES)[0], b"", 60, "bits are cut off"),
        (b"", b"", 60, "cut off"),
    ],
)
def test_what_nobody_wrote_is_refused(data, lower, count, reason):
    with pytest.raises(ValueError, match=reason):
        decode(data, lower, count)


def test_integers_out_of_range_are_refused():
    for values in ([1, 2, 6], [1, 2, 100], [LARGEST]):
        data, lower = encode(values)
        decode(data, lower, len(values), max(values) + 1)
        with pytest.raises(ValueError, match=f"not below {max(values)}"):
            decode(data, lower, len(values), max(values))


def test_conformance_of_few_integers(monkeypatch):
    """With histograms however few they are, so that hostile records reach them."""
    monkeypatch.setattr(universal, "_FEW", 1)
    check_codec(lambda: UniversalCode(2.0, coding="entropy"))
    x = np.random.default_rng(0).standard_normal((9, 30)).astype(np.float32)
    parts = UniversalCode(2.0, coding="entropy").write({"w": x}, Sending()).parts
    assert parts[-1][0] == 6  # it is that code which is tested
