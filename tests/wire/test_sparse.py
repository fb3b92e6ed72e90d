"""Sparse records: what goes in comes out, in few bytes, or is refused."""

import struct
import tracemalloc
import zlib
from contextlib import suppress
from math import ceil

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from flower_ext._flower import recorddict_to_proto
from flower_ext.core.arrays import to_record
from flower_ext.core.replies import MalformedReply
from flower_ext.wire.mask_codes import MASK_CODES, MAX_SIZE, entropy_bytes, smallest
from flower_ext.wire.masks import largest
from flower_ext.wire.sparse import (
    PAYLOAD,
    accept_sparse,
    decode,
    encode,
    is_sparse,
    mask_codes,
    num_values,
    received_masks,
)
from flower_ext.wire.traffic import serialized_bytes
from flower_ext.wire.value_codes import nf4_levels

# Masks ----------------------------------------------------------------------------


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


# Round trip -----------------------------------------------------------------------

dtypes = st.sampled_from(
    [np.float16, np.float32, np.float64, np.int64, np.int32, np.uint8, np.bool_]
)
shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=7)


@st.composite
def masked(draw):
    """Draw named arrays and masks for some of them."""
    names = draw(st.lists(st.text("ab._ü", min_size=1), unique=True, max_size=4))
    arrays = {n: draw(hnp.arrays(dtypes, shapes)) for n in names}
    masks = {
        n: draw(hnp.arrays(np.bool_, x.shape))
        for n, x in arrays.items()
        if draw(st.booleans())
    }
    return arrays, masks


@settings(derandomize=True, deadline=None, max_examples=300)
@given(masked())
def test_round_trip(drawn):
    arrays, masks = drawn
    record = encode(arrays, masks)
    found, kept = decode(record, arrays)
    assert list(found) == list(arrays)
    for name, x in arrays.items():
        mask = masks.get(name, np.ones(x.shape, bool))
        expected = np.where(mask, x, np.zeros((), x.dtype))
        assert found[name].dtype == x.dtype and found[name].shape == x.shape
        assert found[name].tobytes() == expected.tobytes()  # NaN and -0.0 too
        assert np.array_equal(kept[name], mask)
    assert num_values(record) == sum(int(mask.sum()) for mask in kept.values())
    assert is_sparse(record)


@settings(derandomize=True, deadline=None)
@given(masked(), st.sampled_from(["bfloat16", "nf4"]))
def test_rounded_values_round_once(drawn, precision):
    arrays = {
        n: np.clip(np.nan_to_num(x), -9, 9) if x.dtype.kind == "f" else x
        for n, x in drawn[0].items()
    }
    once, masks = decode(encode(arrays, drawn[1], precision), arrays)
    twice, _ = decode(encode(once, drawn[1], precision), arrays)
    for name, x in arrays.items():
        if x.dtype.kind == "f":
            assert once[name] == pytest.approx(twice[name], rel=1e-3, abs=1e-7)
            assert np.all(once[name][~masks[name]] == 0)
        else:
            assert np.array_equal(once[name], np.where(masks[name], x, 0))


def test_order_of_the_names_does_not_matter():
    arrays = {"b": np.arange(3.0), "a": np.float32([[7]])}
    found, _ = decode(encode(arrays), dict(reversed(arrays.items())))
    assert list(found) == ["a", "b"]
    assert found["b"].tolist() == [0, 1, 2]


def test_what_is_read_can_be_written():
    arrays = {"a": np.arange(3.0), "b": np.arange(4, dtype=np.int32)}
    found, _ = decode(encode(arrays), arrays)
    for x in found.values():
        x += 1


def test_fortran_order_and_strides():
    x = np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4))[::2]
    mask = x.T.copy().T > 3
    found, kept = decode(encode({"x": x}, {"x": mask}), {"x": x})
    assert np.array_equal(found["x"], np.where(mask, x, 0))
    assert np.array_equal(kept["x"], mask)


# Values ---------------------------------------------------------------------------


def test_bfloat16_is_torchs():
    x = np.float32([1.0, 1.00390625, 3.14159, -1e-30, 1e30, np.inf, -0.0])
    found, _ = decode(encode({"x": x}, precision="bfloat16"), {"x": x})
    assert found["x"].tolist() == torch.tensor(x).bfloat16().float().tolist()


def test_nf4_levels_are_the_published_ones():
    # Appendix E of the QLoRA paper.
    published = [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
    assert nf4_levels() == pytest.approx(published, abs=1e-5)


def test_nf4_is_the_nearest_level_of_its_block():
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    x[64:128] *= 1000
    found, _ = decode(encode({"x": x}, precision="nf4"), {"x": x})
    for start in range(0, 1000, 64):
        block, back = x[start : start + 64], found["x"][start : start + 64]
        levels = nf4_levels() * np.abs(block).max()
        nearest = np.abs(block[:, None] - levels).min(axis=1)
        assert np.abs(block - back) == pytest.approx(nearest, rel=1e-4, abs=1e-6)


def test_values_that_are_not_finite_stay_so():
    x = np.float32([1.0, np.nan, 2.0, np.inf])
    for precision in ("exact", "bfloat16", "nf4"):
        found, _ = decode(encode({"x": x}, precision=precision), {"x": x})
        assert not np.all(np.isfinite(found["x"]))


# Bytes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "each"), [("exact", 4), ("bfloat16", 2), ("nf4", 0.5 + 4 / 64)]
)
def test_bytes_of_the_payload(precision, each):
    size, k = 64_000, 4000
    values = np.random.default_rng(0).standard_normal(size, np.float32)
    mask = largest(values, k)
    record = encode({"w": values}, {"w": mask}, precision)
    payload = record[PAYLOAD].shape[0]
    names = mask_codes(record, {"w": values})
    coded = MASK_CODES[names["w"]].length(np.flatnonzero(mask), size)
    assert ceil(k * each) + coded <= payload <= ceil(k * each) + coded + 40
    # Values and mask are within 2% of the entropy bound for both.
    bound = k * each + entropy_bytes(k, size)
    assert payload <= 1.02 * bound + 40


def test_bytes_as_flower_serialises_them():
    for size in (0, 1, 127, 128, 20_000):
        content = RecordDict(
            {
                "arrays": to_record(
                    {
                        "a.b": np.zeros(size, np.float32),
                        "scalar": np.float32(1),
                        "ü": np.zeros((3, 0, 200)),
                    }
                ),
                "sparse": encode({"w": np.zeros(size)}),
                "metrics": MetricRecord({"loss": 1.0}),
                "config": ConfigRecord({"a": 1, "b": "text"}),
                "empty": ArrayRecord(),
            }
        )
        assert serialized_bytes(content) == recorddict_to_proto(content).ByteSize()


def test_flowers_own_size_of_a_dense_record_is_counted_too():
    assert num_values(to_record({"a": np.zeros((3, 4)), "b": np.float32(1)})) == 13


# Malformed payloads ---------------------------------------------------------------

LIKE = {"a": np.zeros((4, 5), np.float32), "b": np.zeros(3, np.int64)}


def honest():
    arrays = {
        "a": np.arange(20, dtype=np.float32).reshape(4, 5),
        "b": np.array([1, 2, 3]),
    }
    return encode(arrays, {"a": arrays["a"] % 4 == 1})


def raw():
    return honest()[PAYLOAD].numpy().tobytes()


def as_record(payload):
    return to_record({PAYLOAD: np.frombuffer(payload, np.uint8)})


def signed(body):
    """A payload whose checksum is right, whatever it holds."""
    return as_record(struct.pack("<4sI", b"FXS1", zlib.crc32(body)) + body)


@settings(derandomize=True, deadline=None, max_examples=400)
@given(st.data())
def test_altered_payload_is_refused_or_harmless(data):
    body = bytearray(raw()[8:])
    for _ in range(data.draw(st.integers(1, 3))):
        action = data.draw(st.sampled_from(["flip", "cut", "add"]))
        at = data.draw(st.integers(0, max(len(body) - 1, 0)))
        if action == "flip" and body:
            body[at] ^= data.draw(st.integers(1, 255))
        elif action == "cut":
            del body[at:]
        else:
            body[at:at] = data.draw(st.binary(min_size=1, max_size=4))
    try:
        arrays, masks = decode(signed(bytes(body)), LIKE)
    except MalformedReply:
        return
    for name, x in LIKE.items():
        assert arrays[name].shape == x.shape == masks[name].shape
        assert arrays[name].dtype == x.dtype
        assert np.all(arrays[name][~masks[name]] == 0)


def peak(function):
    """Return the largest number of bytes that a call held at a time."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


FLOATS = {"w": np.zeros(1000, np.float32)}


def sections(*parts, values=10, precision=0):
    """Build a payload for :data:`FLOATS` of which all behind its head is given."""
    head = struct.unpack_from("<I", encode(FLOATS)[PAYLOAD].numpy().tobytes(), 8)[0]
    return signed(struct.pack("<IBQ", head, precision, values) + b"".join(parts))


def stated(which, count, mask, length=None):
    length = len(mask) if length is None else length
    return bytes([which]) + struct.pack("<II", count, length) + mask


LONG = 1 << 22


@pytest.mark.parametrize("precision", range(3))
@pytest.mark.parametrize(
    "section",
    [
        stated(2, 10, b"\xff" * LONG),
        stated(3, 10, b"\1\0\0\0" * (LONG // 4)),
        stated(4, 10, b"\x01" * LONG),
        stated(4, 1000, b"\x01" * LONG),
        stated(5, 10, b"\x00" + b"\xff" * LONG),
        stated(5, 1000, b"\x00" + b"\xff" * LONG),
        stated(5, 1000, b"\x1f" + b"\xff" * LONG),
        stated(5, 10, b"\x07" + b"\x00" * LONG),
        *(stated(which, 2**32 - 1, b"\1" * LONG) for which in (2, 3, 4, 5)),
        *(stated(which, 10, b"\1" * LONG, 2**32 - 1) for which in (2, 3, 4, 5)),
        b"\x00" + b"\x01" * LONG,
        b"\x01" + b"\x01" * LONG,
    ],
)
def test_memory_depends_on_the_layout_and_not_on_the_payload(section, precision):
    record = sections(section, precision=precision)

    def refused():
        with pytest.raises(MalformedReply):
            decode(record, FLOATS)

    refused()
    # 4 kB of arrays; the payload of 4 MB was there before.
    assert peak(refused) < 64_000


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


def test_an_array_that_states_more_numbers_than_it_has_counts_for_none():
    huge = Array("float32", (2**40, 2**40), "numpy.ndarray", b"1234")
    assert num_values(ArrayRecord({"w": huge, "b": Array(np.zeros(3))})) == 3
    assert num_values(sections(b"", values=2**63)) == 0


@settings(derandomize=True, deadline=None)
@given(st.integers(0, 200), st.integers(1, 255))
def test_any_flipped_bit_is_seen(at, flip):
    payload = bytearray(raw())
    payload[at % len(payload)] ^= flip
    with pytest.raises(MalformedReply, match="a sparse payload cannot be read"):
        decode(as_record(bytes(payload)), LIKE)


def body_with(count=5, mask=b"", which=3, total=8, tail=b"", layout=None):
    """Build a body by hand: array a with a mask of int32, array b whole."""
    expected = struct.unpack_from("<I", raw(), 8)[0] if layout is None else layout
    head = struct.pack("<IBQ", expected, 0, total)
    section = bytes([which]) + struct.pack("<II", count, len(mask)) + mask
    return head + section + bytes(4 * count) + bytes([1]) + bytes(24) + tail


def int32(*positions):
    return np.array(positions, "<u4").tobytes()


def test_payload_by_hand():
    arrays, masks = decode(signed(body_with(mask=int32(1, 5, 9, 13, 17))), LIKE)
    assert np.flatnonzero(masks["a"]).tolist() == [1, 5, 9, 13, 17]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (body_with(mask=int32(1, 5, 9, 13, 20)), "out of range"),
        (body_with(mask=int32(1, 5, 9, 13, 2**32 - 1)), "out of range"),
        (body_with(mask=int32(1, 5, 5, 13, 17)), "do not increase"),
        (body_with(mask=int32(9, 5, 6, 13, 17)), "do not increase"),
        (body_with(mask=int32(1, 5, 9, 13)), "must have 20"),
        (body_with(count=21), "21 values for an array of 20"),
        (body_with(which=77, mask=b""), "mask code 77"),
        (body_with(mask=int32(1, 5, 9, 13, 17), tail=b"x"), "1 bytes too many"),
        (body_with(mask=int32(1, 5, 9, 13, 17), total=9), "9 were announced"),
        (body_with(mask=int32(1, 5, 9, 13, 17))[:-1], "cut off"),
        (body_with(layout=7), "not the 2 expected, such as"),
        (body_with(which=2, count=3, mask=b"\xe0\x00\x0f"), "behind the end"),
        (body_with(which=2, count=3, mask=b"\xf0\x00\x00"), "4 ones must have 3"),
        (body_with(which=4, count=1, mask=b"\x80"), "0 ones must have 1"),
        (body_with(which=4, count=1, mask=b"\x01\x80"), "cut off"),
        (body_with(which=4, count=2, mask=b"\xff" * 5 + b"\x01" * 2), "5 bytes"),
        (body_with(which=4, count=1, mask=b"\x01" * 6), "must be at most 5"),
        (body_with(which=4, count=1, mask=b"\x14"), "out of range"),
        (body_with(which=5, count=1, mask=b"\xff\x80"), "a shift of 255 for 1 value"),
        (body_with(which=5, count=9, mask=b"\x03\x80"), "a shift of 3 for 9 values"),
        (body_with(which=5, count=1, mask=b""), "needs a shift"),
        (body_with(which=5, count=9, mask=b"\x02\x80"), "cut off"),
        (body_with(which=5, count=2, mask=b"\x02" + b"\xff" * 3), "must be at most 1"),
        (body_with(which=5, count=1, mask=b"\x00\x80\x00"), "bytes behind the end"),
        (b"", "cannot be read"),
    ],
)
def test_malformed_payload(body, reason):
    with pytest.raises(MalformedReply, match=reason):
        decode(signed(body), LIKE)


def test_precision_that_is_not_known():
    body = bytearray(body_with(mask=int32(1, 5, 9, 13, 17)))
    body[4] = 9
    with pytest.raises(MalformedReply, match="precision 9"):
        decode(signed(bytes(body)), LIKE)
    with pytest.raises(ValueError, match="precision='int8'"):
        encode({}, precision="int8")


@pytest.mark.parametrize(
    "record",
    [
        ArrayRecord(),
        to_record({"w": np.zeros(3)}),
        to_record({PAYLOAD: np.zeros(3, np.uint8), "w": np.zeros(3)}),
        to_record({PAYLOAD: np.zeros(3, np.uint8)}),
        to_record({PAYLOAD: np.zeros(60, np.uint8)}),
        to_record({PAYLOAD: np.zeros(30, np.float32)}),
        to_record({PAYLOAD: np.zeros((5, 9), np.uint8)}),
        ArrayRecord({PAYLOAD: Array("uint8", (3,), "numpy.ndarray", b"no array")}),
        ArrayRecord({PAYLOAD: Array("uint8", (3,), "other", b"")}),
    ],
)
def test_record_that_is_no_sparse_one(record):
    with pytest.raises(MalformedReply):
        decode(record, LIKE)
    assert num_values(record) >= 0


@pytest.mark.parametrize(
    "like",
    [
        {"a": LIKE["a"]},
        {**LIKE, "c": LIKE["b"]},
        {"a": LIKE["a"].T, "b": LIKE["b"]},
        {"a": LIKE["a"].astype(np.float64), "b": LIKE["b"]},
        {"x": LIKE["a"], "b": LIKE["b"]},
    ],
)
def test_arrays_that_are_not_those_expected(like):
    with pytest.raises(MalformedReply, match="not the . expected"):
        decode(honest(), like)


# Models ---------------------------------------------------------------------------


def test_model_loads_sparse_and_dense_records():
    model = accept_sparse(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    state = {name: x.numpy().copy() for name, x in model.state_dict().items()}
    mask = {"0.weight": np.array([[1, 0, 0], [0, 1, 1]], bool)}
    record = encode(state, mask)
    assert not model.load_state_dict(record.to_torch_state_dict()).missing_keys
    expected = np.where(mask["0.weight"], state["0.weight"], 0)
    assert np.array_equal(model[0].weight.detach().numpy(), expected)
    assert np.array_equal(received_masks(model)["0.weight"].numpy(), mask["0.weight"])
    assert received_masks(model)["1.running_var"].all()
    model.load_state_dict(to_record(state).to_torch_state_dict())
    assert np.array_equal(model[0].weight.detach().numpy(), state["0.weight"])
    assert received_masks(model) is None


def test_model_refuses_the_payload_of_another():
    record = encode({"weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(ValueError, match="not the 2 expected"):
        accept_sparse(nn.Linear(3, 2)).load_state_dict(record.to_torch_state_dict())
