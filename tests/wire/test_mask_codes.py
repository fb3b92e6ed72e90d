"""Codes for masks: what goes in comes out, in few bytes, or is refused."""

import tracemalloc
from contextlib import suppress
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flower_ext.wire.mask_codes import MASK_CODES, MAX_SIZE, entropy_bytes, smallest
from flower_ext.wire.masks import largest


@st.composite
def positions(draw):
    """Draw increasing positions and a size, dense, sparse or in clusters."""
    size = draw(st.integers(1, 3000))
    density = draw(st.sampled_from([0.0, 0.001, 0.06, 0.5, 0.99, 1.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    mask = rng.random(size) < density
    if draw(st.booleans()):
        mask[: size // 2] = np.repeat(mask[: ceil(size / 2) // 20 + 1], 20)[: size // 2]
    return np.flatnonzero(mask), size


@settings(derandomize=True, deadline=None, max_examples=300)
@given(positions(), st.sampled_from(list(MASK_CODES)))
def test_mask_code_round_trip_and_its_length(drawn, name):
    found, size = drawn
    code = MASK_CODES[name]
    data = code.encode(found, size)
    assert len(data) == code.length(found, size)
    assert np.array_equal(code.decode(data, len(found), size), found)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(positions(), st.sampled_from(list(MASK_CODES)), st.data())
def test_any_bytes_are_a_mask_or_refused(drawn, name, data):
    found, size = drawn
    code = MASK_CODES[name]
    honest = code.encode(found, size)
    other = data.draw(
        st.binary(min_size=0, max_size=40)
        | st.integers(0, max(len(honest) - 1, 0)).map(
            lambda i: (
                honest[:i] + bytes([honest[i] ^ 16]) + honest[i + 1 :]
                if honest
                else b"x"
            )
        )
    )
    count = data.draw(st.sampled_from([len(found), 0, 1, 7]))
    try:
        read = code.decode(other, count, size)
    except ValueError:
        return
    assert len(read) == count
    assert np.all(np.diff(read) > 0)
    assert count == 0 or (read[0] >= 0 and read[-1] < size)


@pytest.mark.parametrize("name", ["int32", "varint", "rice"])
def test_gaps_up_to_the_largest_array(name):
    found = np.array([0, 1, 2**28 + 5, MAX_SIZE - 1])
    code = MASK_CODES[name]
    data = code.encode(found, MAX_SIZE)
    assert len(data) == code.length(found, MAX_SIZE)
    assert np.array_equal(code.decode(data, 4, MAX_SIZE), found)
    with pytest.raises(ValueError, match="out of range"):
        code.decode(data, 4, MAX_SIZE - 1)


def test_array_that_is_too_large():
    with pytest.raises(ValueError, match="size=2147483648 must be <="):
        smallest(np.array([1]), MAX_SIZE + 1)


@pytest.mark.parametrize("density", [0.4, 1 / 4, 1 / 16, 1 / 64, 1 / 1024])
def test_rice_is_within_five_percent_of_the_entropy(density):
    size = 400_000
    values = np.random.default_rng(1).standard_normal(size, np.float32)
    found = np.flatnonzero(largest(values, int(density * size)))
    length = MASK_CODES["rice"].length(found, size)
    assert length <= 1.05 * entropy_bytes(len(found), size)


def test_entropy():
    assert entropy_bytes(0, 8) == entropy_bytes(8, 8) == entropy_bytes(0, 0) == 0
    assert entropy_bytes(4, 8) == pytest.approx(1)  # eight fair coins


def test_the_shortest_code_is_chosen():
    size = 500_000
    rng = np.random.default_rng(0)
    dense, thin = (np.flatnonzero(rng.random(size) < p) for p in (0.6, 0.02))
    clusters = np.concatenate([np.arange(i, i + 40) for i in range(0, size, 100_000)])
    for found, best in ((dense, "bitmap"), (thin, "rice"), (clusters, "varint")):
        lengths = {n: len(c.encode(found, size)) for n, c in MASK_CODES.items()}
        assert lengths[smallest(found, size)] == min(lengths.values())
        assert smallest(found, size) == best
    assert smallest(np.array([2**30]), MAX_SIZE) == "int32"


def peak(function):
    """Return the largest number of bytes that a call held at a time."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    st.sampled_from(list(MASK_CODES)),
    st.integers(1, 20_000),
    st.floats(0, 1),
    st.integers(0, 31),
    st.integers(0, 2**32),
)
def test_memory_of_a_mask_depends_on_the_size(name, size, density, shift, seed):
    code, rng = MASK_CODES[name], np.random.default_rng(seed)
    found = np.flatnonzero(rng.random(size) < density)
    data = bytearray(code.encode(found, size))
    if name == "rice":
        data[0] = shift
    data += rng.bytes(int(rng.integers(0, 2)) * 100_000)

    def read():
        with suppress(ValueError):
            code.decode(bytes(data), len(found), size)

    # Positions are int64, and a few arrays of them are held at a time.
    assert peak(read) < 8 * 8 * size + len(data) + 32_000
