"""Codecs: what goes in comes out, in few bytes, or is refused in bounded memory."""

import doctest
import importlib
import struct
import tracemalloc
import zlib
from math import ceil

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flower_ext._flower import recorddict_to_proto
from flower_ext.core.arrays import to_record
from flower_ext.core.replies import MalformedReply
from flower_ext.wire import NF4, BFloat16, Chain, Exact, FixedMask
from flower_ext.wire.codec import PAYLOAD, is_encoded, num_values
from flower_ext.wire.mask_codes import MASK_CODES, entropy_bytes, smallest
from flower_ext.wire.masks import largest
from flower_ext.wire.traffic import serialized_bytes
from flower_ext.wire.value_codes import VALUE_CODES, nf4_levels


def encode(arrays, masks=None, precision="exact"):
    """Encode what is in the masks."""
    return Chain(FixedMask(masks or {}), VALUE_CODES[precision]).encode(arrays)


def decode(record, like, precision="exact"):
    """Return arrays, and what of them travelled."""
    found = Chain(FixedMask({}), VALUE_CODES[precision]).unpack(record, like)
    return found.arrays, found.masks


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
    assert is_encoded(record)


@settings(derandomize=True, deadline=None)
@given(masked(), st.sampled_from(["bfloat16", "nf4"]))
def test_rounded_values_round_once(drawn, precision):
    arrays = {
        n: np.clip(np.nan_to_num(x), -9, 9) if x.dtype.kind == "f" else x
        for n, x in drawn[0].items()
    }
    once, masks = decode(encode(arrays, drawn[1], precision), arrays, precision)
    twice, _ = decode(encode(once, drawn[1], precision), arrays, precision)
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
    found = BFloat16().decode(BFloat16().encode({"x": x}), {"x": x})
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
    found = NF4().decode(NF4().encode({"x": x}), {"x": x})
    for start in range(0, 1000, 64):
        block, back = x[start : start + 64], found["x"][start : start + 64]
        levels = nf4_levels() * np.abs(block).max()
        nearest = np.abs(block[:, None] - levels).min(axis=1)
        assert np.abs(block - back) == pytest.approx(nearest, rel=1e-4, abs=1e-6)


def test_values_that_are_not_finite_stay_so():
    x = np.float32([1.0, np.nan, 2.0, np.inf])
    for code in (Exact(), BFloat16(), NF4()):
        found = code.decode(code.encode({"x": x}), {"x": x})
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
    positions = np.flatnonzero(mask)
    coded = MASK_CODES[smallest(positions, size)].length(positions, size)
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
                "encoded": encode({"w": np.zeros(size)}),
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
    return as_record(struct.pack("<I", zlib.crc32(body)) + body)


@settings(derandomize=True, deadline=None, max_examples=400)
@given(st.data())
def test_altered_payload_is_refused_or_harmless(data):
    body = bytearray(raw()[4:])
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


def head(layout, values, *tags):
    """Build the head of a payload."""
    return bytes([len(tags)]) + b"".join(tags) + struct.pack("<IQ", layout, values)


def sections(*parts, values=10, precision="exact"):
    """Build a payload for :data:`FLOATS` of which all behind its head is given."""
    (layout,) = struct.unpack_from("<I", encode(FLOATS)[PAYLOAD].numpy().tobytes(), 9)
    tag = VALUE_CODES[precision].tag
    return signed(head(layout, values, b"mk", tag) + b"".join(parts))


def stated(which, count, mask, length=None):
    length = len(mask) if length is None else length
    return bytes([which]) + struct.pack("<II", count, length) + mask


LONG = 1 << 22


@pytest.mark.parametrize("precision", VALUE_CODES)
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
            decode(record, FLOATS, precision)

    refused()
    # 4 kB of arrays; the payload of 4 MB was there before.
    assert peak(refused) < 64_000


def test_an_array_that_states_more_numbers_than_it_has_counts_for_none():
    huge = Array("float32", (2**40, 2**40), "numpy.ndarray", b"1234")
    assert num_values(ArrayRecord({"w": huge, "b": Array(np.zeros(3))})) == 3
    assert num_values(sections(b"", values=2**63)) == 0


@settings(derandomize=True, deadline=None)
@given(st.integers(0, 200), st.integers(1, 255))
def test_any_flipped_bit_is_seen(at, flip):
    payload = bytearray(raw())
    payload[at % len(payload)] ^= flip
    with pytest.raises(MalformedReply, match="an encoded record cannot be read"):
        decode(as_record(bytes(payload)), LIKE)


def body_with(count=5, mask=b"", which=3, total=8, tail=b"", layout=None):
    """Build a body by hand: array a with a mask of int32, array b whole."""
    expected = struct.unpack_from("<I", raw(), 9)[0] if layout is None else layout
    section = bytes([which]) + struct.pack("<II", count, len(mask)) + mask
    begin = head(expected, total, b"mk", b"ex")
    return begin + section + bytes([1]) + bytes(4 * count + 24) + tail


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


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ((), "0 stages"),
        ((b"mk",) * 9, "9 stages"),
        ((b"mk", b"n4"), "coded as .*n4.*was asked for"),
        ((b"mk",), "was asked for"),
        ((b"ex",), "was asked for"),
        ((b"??", b"ex"), "was asked for"),
    ],
)
def test_records_of_other_codecs(tags, reason):
    body = body_with(mask=int32(1, 5, 9, 13, 17))
    with pytest.raises(MalformedReply, match=reason):
        decode(signed(bytes([len(tags)]) + b"".join(tags) + body[5:]), LIKE)


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
def test_record_that_is_no_encoded_one(record):
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


@pytest.mark.parametrize("name", ["chain", "codec", "registry", "rotated", "wrappers"])
def test_doctests(name):
    module = importlib.import_module(f"flower_ext.wire.{name}")
    assert doctest.testmod(module).failed == 0
