"""The classical quantizers: closed forms, lengths, and what their papers promise."""

import struct
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flower_ext.wire import (
    EDEN,
    QSGD,
    Chain,
    ErrorFeedback,
    OneBit,
    RandomK,
    Sending,
    TernGrad,
    ThreeLC,
    TopK,
    UniversalCode,
    qsgd,
    ternary,
    three_lc,
)
from flower_ext.wire.codec import PAYLOAD, Reader, num_values
from flower_ext.wire.wrappers import upload

CODES = [TernGrad(), ThreeLC(), ThreeLC(1.75), OneBit(), OneBit(5)]
CODES += [QSGD(2), QSGD(4), QSGD(8, bucket=7)]
F4 = np.dtype(np.float32)


def normal(size, seed=0):
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def there_and_back(codec, x, seed=0):
    sending = Sending(np.random.default_rng(seed))
    return codec.decode(codec.encode({"w": x}, sending), {"w": x})["w"]


def num_bytes(codec, x):
    """Return the bytes of one array behind what begins every record."""
    stages = len(codec.stages)
    return len(codec.encode({"w": x})[PAYLOAD].numpy()) - (4 + 1 + 2 * stages + 4 + 8)


def draws(codec, x, count):
    """Return many independent codings of x, ``(count, len(x))``, in buckets of it."""
    return there_and_back(codec, np.tile(x, count)).reshape(count, -1).astype(float)


def check_moments(found, x, variance):
    """Hold the mean and the variance of each coordinate to closed forms, at 5 sigma."""
    error = found - x
    square = error**2
    root = np.sqrt(len(found))
    assert (np.abs(error.mean(0)) <= 5 * np.sqrt(variance) / root + 1e-6).all()
    assert square.mean(0) == pytest.approx(variance, rel=0.2, abs=1e-5)
    spread = square.sum(1).std() / root
    assert abs(square.sum(1).mean() - variance.sum()) < 5 * spread
    assert spread < 0.02 * variance.sum()


# QSGD ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_qsgd_has_the_variance_of_its_paper(bits):
    x, top = normal(12), 2 ** (bits - 1) - 1
    norm = np.linalg.norm(x.astype(float))
    share = np.abs(x) / norm * top % 1
    variance = (norm / top) ** 2 * share * (1 - share)
    check_moments(draws(QSGD(bits, bucket=12), x, 20_000), x, variance)
    assert variance.sum() <= min(12 / top**2, np.sqrt(12) / top) * norm**2


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [1, 30, 512])
def test_qsgd_keeps_the_bounds_of_lemma_3_1(bits, size):
    top, count = 2 ** (bits - 1) - 1, 200
    x = np.sinh(2 * normal(size)).astype(np.float32)
    found = draws(QSGD(bits, bucket=size), x, count)
    square = float((x.astype(float) ** 2).sum())
    error = ((found - x) ** 2).sum(1)
    bound = min(size / top**2, np.sqrt(size) / top) * square
    assert error.mean() <= bound + 5 * error.std() / np.sqrt(count) + 1e-9
    nonzero = (found != 0).sum(1)
    assert nonzero.mean() <= top * (top + np.sqrt(size)) + 5 * nonzero.std()


def rice_bytes(gaps):
    """Return the bytes of Rice's code: a shift, ends in unary, and low bits."""
    return 1 + min(
        (len(gaps) + sum(g >> k for g in gaps) + 7) // 8 + (k * len(gaps) + 7) // 8
        for k in range(8)
    )


def mask_bytes(mask):
    """Return the bytes of a bitmap, or of the gaps between the rarer kind."""
    rare = np.flatnonzero(mask if 2 * np.sum(mask) <= len(mask) else ~mask)
    return min((len(mask) + 7) // 8, rice_bytes(np.diff(rare, prepend=-1) - 1))


@pytest.mark.parametrize(
    ("bits", "bucket", "size", "is_fixed"),
    [
        (2, 64, 1000, False),
        (4, 64, 1000, False),
        (8, 64, 1000, False),
        (3, 1, 1000, True),
        (4, 64, 20, True),
    ],
)
def test_qsgd_takes_the_shorter_code(bits, bucket, size, is_fixed):
    """Counted from what is decoded: every value is its level's share of the norm."""
    x, top = normal(size), 2 ** (bits - 1) - 1
    codec = QSGD(bits, bucket)
    found = there_and_back(codec, x)
    norms = [np.linalg.norm(x[i : i + bucket]) for i in range(0, size, bucket)]
    levels = np.rint(found / np.repeat(norms, bucket)[:size] * top).astype(int)
    sizes = np.abs(levels[levels != 0])
    unary = np.isin(np.arange(sizes.sum()), np.cumsum(sizes) - 1)
    masks = mask_bytes(levels != 0) + mask_bytes(unary)
    sparse = 18 + masks + (len(sizes) + 7) // 8
    fixed = (bits * size + 7) // 8
    assert num_bytes(codec, x) == 4 + 6 + 4 * len(norms) + min(sparse, fixed)
    assert (fixed < sparse) == is_fixed


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.data())
def test_both_codes_of_levels_return_them(bits, data):
    top = 2 ** (bits - 1) - 1
    some = st.integers(-top, top) if data.draw(st.booleans()) else st.just(top)
    drawn = data.draw(st.lists(st.one_of(st.just(0), some), max_size=80))
    levels = np.array(drawn, np.int8)
    for encoded, decode in (
        (qsgd._encode_fixed(levels, bits), qsgd._decode_fixed),
        (qsgd._encode_sparse(levels), qsgd._decode_sparse),
    ):
        reader = Reader(memoryview(encoded))
        assert decode(reader, len(levels), bits).tolist() == drawn
        assert not reader.left


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_levels_take_little_more_than_their_entropy(bits):
    """A bucket's norm takes 1/16 bit a value, which is not counted."""
    top, count = 2 ** (bits - 1) - 1, 512 * 200
    x = normal(count)
    found = there_and_back(QSGD(bits), x).reshape(-1, 512)
    norms = np.linalg.norm(x.reshape(-1, 512), axis=1, keepdims=True)
    _, often = np.unique(np.rint(found / norms * top), return_counts=True)
    entropy = -(often / count * np.log2(often / count)).sum()
    taken = 8 * num_bytes(QSGD(bits), x) / count - 1 / 16
    assert entropy < taken < 1.05 * entropy


def test_a_bucket_that_is_not_finite_leaves_the_others():
    x = normal(30)
    x[12] = np.nan
    for codec in (QSGD(8, bucket=10), OneBit(10)):
        found = there_and_back(codec, x)
        assert np.isfinite(found[:10]).all() and np.isfinite(found[20:]).all()
        assert np.isnan(found[12])


# TernGrad -----------------------------------------------------------------------------


def test_terngrad_has_the_variance_of_its_equations():
    x = normal(12)
    scale = np.abs(x).max().astype(float)
    magnitude = np.abs(x.astype(float))
    found = draws(TernGrad(), x, 20_000)
    check_moments(found, x, magnitude * (scale - magnitude))
    assert set(np.unique(np.abs(found))) == {0, scale}


@pytest.mark.parametrize("size", [0, 1, 5, 6, 1000])
def test_terngrad_takes_a_fifth_of_a_byte(size):
    assert num_bytes(TernGrad(), normal(size)) == 4 + (size + 4) // 5
    assert num_bytes(TernGrad(), normal(size).astype(float)) == 8 + (size + 4) // 5


def test_a_byte_is_a_number_in_base_three():
    assert ternary.pack(np.int8([1, 0, -1, 0, 0, -1])).tolist() == [
        2 * 81 + 1 * 27 + 0 * 9 + 1 * 3 + 1,
        0 * 81 + 40,
    ]
    assert ternary.pack(np.zeros(5, np.int8)).tolist() == [ternary.ZEROS]
    every = np.array(np.meshgrid(*[[-1, 0, 1]] * 5)).reshape(5, -1).T.astype(np.int8)
    packed = ternary.pack(every.reshape(-1))
    assert sorted(packed) == list(range(243))
    assert ternary.unpack(packed, every.size).tolist() == every.reshape(-1).tolist()


# 3LC ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [1.0, 1.3, 1.99])
def test_3lc_rounds_as_its_paper_says(sparsity):
    x = np.append(np.sinh(normal(500)).astype(np.float64), np.linspace(-25, 25, 500))
    scale = sparsity * np.abs(x).max()
    found = there_and_back(ThreeLC(sparsity), x)
    assert found == pytest.approx(scale * np.round(x / scale), rel=1e-15)
    assert np.abs(found - x).max() <= scale / 2
    assert found[np.abs(x).argmax()] != 0


def test_3lc_takes_a_byte_for_fourteen_of_zeros():
    for zeros, runs in (
        (1, [121]),
        (2, [243]),
        (14, [255]),
        (15, [255, 121]),
        (31, [255, 255, 244]),
    ):
        packed = np.uint8([5, *[121] * zeros, 7])
        assert three_lc._shorten(packed).tolist() == [5, *runs, 7]
        x = np.zeros(5 * zeros, np.float32)
        assert num_bytes(ThreeLC(), x) == 4 + 4 + len(runs)
    # The first value only: one byte of 201, then 99 of zeros.
    x = np.zeros(500, np.float32)
    x[0] = 3
    assert num_bytes(ThreeLC(), x) == 4 + 4 + 1 + 8


@given(st.lists(st.one_of(st.just(121), st.integers(0, 242)), max_size=120))
@settings(deadline=None)
def test_runs_are_put_back(values):
    packed = np.array(values, np.uint8)
    coded = three_lc._shorten(packed)
    assert three_lc._lengthen(coded, len(packed)).tolist() == values
    expanded = [[121] * (c - 241) if c > 242 else [c] for c in coded.tolist()]
    assert sum(expanded, []) == values


# One bit ------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket", [1, 7, 30, 10_000])
def test_one_bit_is_the_mean_of_each_side(bucket):
    x = normal(100).astype(np.float64) + 0.3
    found = there_and_back(OneBit(bucket), x)
    for i in range(0, 100, bucket):
        own, coded = x[i : i + bucket], found[i : i + bucket]
        for side in (own >= 0, own < 0):
            if side.any():
                assert coded[side] == pytest.approx(own[side].mean(), rel=1e-12)
            assert abs((own - coded)[side].sum()) < 1e-12
    buckets = -(-100 // bucket)
    assert num_bytes(OneBit(bucket), x) == 4 + 4 + 2 * 8 * buckets + 13
    assert num_bytes(OneBit(bucket), normal(100)) == 4 + 4 + 2 * 4 * buckets + 13


def test_no_other_means_are_closer():
    x = normal(60)
    found = there_and_back(OneBit(), x)
    least = ((x - found) ** 2).sum()
    for above in (-0.05, 0, 0.05):
        for below in (-0.05, 0, 0.05):
            other = found + np.where(x >= 0, above, below)
            assert ((x - other) ** 2).sum() >= least * (1 - 1e-6)


# Random coordinates -------------------------------------------------------------------


def test_random_k_sends_k_and_no_places():
    x = {"w": normal(1000), "b": normal(3), "n": np.array(4)}
    record = RandomK(0.1).encode(x)
    found = RandomK(0.1).unpack(record, x)
    assert found.masks["w"].sum() == 100 and found.masks["b"].sum() == 1
    assert num_values(record) == 102
    assert (found.arrays["w"] == np.where(found.masks["w"], x["w"], 0)).all()
    head = 4 + 1 + 2 * 2 + 4 + 8
    kinds = 3
    assert len(record[PAYLOAD].numpy()) == head + 17 + kinds + 4 * 101 + 8


@pytest.mark.parametrize("rescaled", [False, True])
def test_random_k_draws_all_coordinates_alike(rescaled):
    x, k, count = normal(20), 6, 1500
    codec = RandomK(0.3, rescaled)
    found = np.stack([there_and_back(codec, x, i) for i in range(count)]).astype(float)
    assert ((found != 0).sum(1) == k).all()
    p = k / 20
    often = (found != 0).mean(0)
    assert (np.abs(often - p) <= 5 * np.sqrt(p * (1 - p) / count)).all()
    # Pairs: of one array's draws none is more likely beside another.
    both = (found != 0).T.astype(float) @ (found != 0) / count
    pair = p * (k - 1) / 19
    apart = ~np.eye(20, dtype=bool)
    assert np.abs(both[apart] - pair).max() <= 5 * np.sqrt(pair * (1 - pair) / count)
    error = ((found - x) ** 2).sum(1)
    expected = (1 / p - 1 if rescaled else 1 - p) * float((x.astype(float) ** 2).sum())
    assert abs(error.mean() - expected) <= 5 * error.std() / np.sqrt(count)
    assert codec.unbiased == rescaled


def test_arrays_have_draws_of_their_own_unless_they_are_tied():
    x = {name: normal(200) for name in "abc"}
    sending = Sending(np.random.default_rng(0), tied={"c": "a"})
    masks = RandomK(0.5).unpack(RandomK(0.5).encode(x, sending), x).masks
    assert (masks["a"] == masks["c"]).all()
    assert 60 < (masks["a"] != masks["b"]).sum() < 140


def test_the_coordinates_are_those_of_the_smallest_words():
    x = {"a": normal(40), "w": normal(50)}
    codec = RandomK(0.2)
    masks = codec.unpack(codec.encode(x, Sending(np.random.default_rng(3))), x).masks
    seed = int(np.random.default_rng(3).integers(2**64, dtype=np.uint64))
    words = np.random.PCG64([seed, 1]).random_raw(50)
    assert set(np.flatnonzero(masks["w"])) == set(np.argsort(words)[:10])
    chosen = codec.choose(x, Sending(np.random.default_rng(3)))
    assert all((chosen[name] == masks[name]).all() for name in x)
    # As NumPy has drawn since 1.17.
    assert np.random.PCG64([7, 1]).random_raw(2).tolist() == [
        14206593023844375757,
        2064693230803885548,
    ]


def test_statistics_travel_whole_and_are_not_multiplied():
    x = {"bn.running_var": normal(9), "w": normal(9), "n": np.arange(9)}
    codec = RandomK(0.5, rescaled=True)
    found = codec.decode(codec.encode(x), x)
    assert (found["bn.running_var"] == x["bn.running_var"]).all()
    assert (found["n"] == x["n"]).all()
    kept = found["w"] != 0
    assert kept.sum() == 4
    assert found["w"][kept] == pytest.approx(x["w"][kept] * 9 / 4)


# All of them --------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [x for x in CODES if x != ThreeLC(1.75)], ids=str)
def test_what_quantizers_return_exactly(codec):
    some = [[0, 3, 0], [-4, 0, 0, 0]] * (not isinstance(codec, OneBit))
    for x in ([], [0], [-2.5], [0, 0, 0], *some):
        for dtype in (np.float16, np.float32, np.float64):
            values = np.array(x, dtype)
            assert there_and_back(codec, values).tolist() == x


@pytest.mark.parametrize("codec", CODES, ids=str)
def test_large_and_small_values_stay_in_range(codec):
    x = normal(60)
    for dtype, power in ((np.float32, 36), (np.float32, -36), (np.float64, 150)):
        scaled = x.astype(dtype) * dtype(10.0) ** power
        found = there_and_back(codec, scaled) / dtype(10.0) ** power
        unit = there_and_back(codec, x.astype(dtype))
        assert found == pytest.approx(unit, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("codec", "bound"),
    [
        (OneBit(), 12),
        (OneBit(10), 4),
        (ThreeLC(), 1),
        (ThreeLC(1.5), 3),
        (QSGD(8, bucket=50), 1),
        (RandomK(0.25), 40),
        (Chain(TopK(0.25), ThreeLC()), 2),
        (Chain(RandomK(0.5), QSGD(8)), 16),
    ],
    ids=str,
)
def test_what_is_left_out_comes_later(codec, bound):
    """The mean over T rounds of a constant is off by a residual over T."""
    x = {"w": normal(50).astype(np.float64)}
    largest = np.abs(x["w"]).max()
    codec, draws = ErrorFeedback(codec), np.random.default_rng(0)
    kept, total = None, np.zeros(50)
    for rounds in range(1, 301):
        record, kept, _ = upload(codec, x, kept, Sending(draws))
        total += codec.decode(record, x)["w"]
        off = np.abs(total / rounds - x["w"]).max()
        assert off <= bound * largest / rounds * (1 + 1e-6)


@pytest.mark.parametrize(
    ("grows", "shrinks"),
    [
        (QSGD(4), QSGD(6)),
        (EDEN(0.5), EDEN(0.5, unbiased=False)),
        (EDEN(0.7), EDEN(0.9)),
        (RandomK(0.25, rescaled=True), RandomK(0.25)),
        (UniversalCode(4, rounding="stochastic"), UniversalCode(1)),
    ],
    ids=str,
)
def test_feedback_is_for_what_shrinks(grows, shrinks):
    """As it warns: with few bits, what is right on average loses more than there is."""
    x = {"w": normal(4096)}
    for codec in (grows, shrinks):
        kept, draws, left = None, np.random.default_rng(0), []
        for _ in range(60):
            kept = upload(ErrorFeedback(codec), x, kept, Sending(draws)).residual
            left.append(np.linalg.norm(kept["w"]) / np.linalg.norm(x["w"]))
        if codec == grows:
            assert left[59] > 2 * left[29] > 4
        else:
            assert left[59] < 1.2 * left[29] + 0.1 < 10


def test_chains_are_right_on_average_if_all_their_links_are():
    assert Chain(RandomK(0.5, rescaled=True), QSGD()).unbiased
    assert not Chain(RandomK(0.5), QSGD()).unbiased
    assert not Chain(TopK(0.5), TernGrad()).unbiased
    assert not Chain(RandomK(0.5, rescaled=True), OneBit()).unbiased
    assert TernGrad().unbiased and QSGD().unbiased
    assert not OneBit().unbiased and not ThreeLC().unbiased


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (partial(QSGD, 0), "bits=0"),
        (partial(QSGD, 1), "bits=1"),
        (partial(QSGD, 9), "bits=9"),
        (partial(QSGD, 4.0), "bits=4.0"),
        (partial(QSGD, True), "bits=True"),
        (partial(QSGD, bucket=0), "bucket=0"),
        (partial(QSGD, bucket=2**32), "bucket="),
        (partial(OneBit, 0), "bucket=0"),
        (partial(OneBit, -1), "bucket=-1"),
        (partial(OneBit, None), "bucket=None"),
        (partial(ThreeLC, 0.5), "sparsity=0.5"),
        (partial(ThreeLC, 2), "sparsity=2"),
        (partial(ThreeLC, float("nan")), "sparsity=nan"),
        (partial(RandomK, 0), "density=0"),
        (partial(RandomK, 1.5), "density=1.5"),
        (partial(RandomK, "all"), "density='all'"),
        (partial(RandomK, lambda server_round: -1), "density=-1"),
        (partial(RandomK, 0.5, 4), "rescaled=4"),
        (partial(RandomK, 0.5, dense="head"), "dense='head'"),
    ],
)
def test_settings_out_of_range(make, match):
    with pytest.raises(ValueError, match=match):
        make()


ONE = np.float32(1).tobytes()


def sparse(bits, head, coded):
    """Return what QSGD writes of a bucket of eight values with the norm 1."""
    return bytes([bits, 0, 8, 0, 0, 0]) + ONE + struct.pack("<BIIBQ", *head) + coded


@pytest.mark.parametrize(
    ("code", "data", "count"),
    [
        (TernGrad, ONE + b"\xf3", 5),
        (TernGrad, ONE, 5),
        (ThreeLC, b"\0\0", 5),
        (ThreeLC, ONE + b"\xff", 5),
        (ThreeLC, ONE + b"\x79\x79", 5),
        (ThreeLC, ONE, 5),
        (OneBit, b"\0\0", 8),
        (OneBit, bytes(4) + 2 * ONE + b"\0", 8),
        (OneBit, b"\x08\0\0\0" + 2 * ONE, 8),
        (OneBit, b"\x01\0\0\0" + 2 * ONE + b"\0", 8),
        (QSGD, b"\x09\1\x08\0\0\0" + ONE + bytes(9), 8),
        (QSGD, b"\x01\1\x08\0\0\0" + ONE + bytes(1), 8),
        (QSGD, b"\x04\1\0\0\0\0" + ONE + bytes(4), 8),
        (QSGD, b"\x04\1\x08\0\0\0" + ONE + bytes(3), 8),
        (QSGD, b"\x04\1\x08\0\0\0" + ONE + bytes(5), 8),
        # Nine levels of eight, unknown codes, a level of 2 of 1, another sum.
        (QSGD, sparse(4, (2, 9, 1, 2, 9), b"\xff\0\0\xff\x80"), 8),
        (QSGD, sparse(4, (3, 1, 1, 2, 1), b"\x80\0\x80"), 8),
        (QSGD, sparse(4, (2, 1, 1, 3, 1), b"\x80\0\x80"), 8),
        (QSGD, sparse(2, (2, 1, 1, 2, 2), b"\x80\0\x40"), 8),
        (QSGD, sparse(4, (2, 1, 1, 2, 2), b"\x80\0\x80"), 8),
        (QSGD, sparse(4, (2, 1, 1, 2, 1), b"\x80\0\x80\0"), 8),
    ],
)
def test_bytes_that_no_quantizer_wrote(code, data, count):
    with pytest.raises(ValueError, match=r"\w"):
        code.decode_values(data, count, F4)


def test_bytes_that_one_did():
    """The same as above, but right."""
    for code, data, found in (
        (TernGrad, ONE + b"\xf2", 5 * [1]),
        (ThreeLC, ONE + b"\x79", 5 * [0]),
        (OneBit, b"\x08\0\0\0" + 2 * ONE + b"\0", 8 * [1]),
        (QSGD, b"\x04\1\x08\0\0\0" + ONE + b"\x7f" + bytes(3), [1, -1] + 6 * [0]),
        (QSGD, sparse(2, (2, 1, 1, 2, 1), b"\x80\0\x80"), [1] + 7 * [0]),
        (QSGD, sparse(3, (2, 1, 1, 2, 3), b"\x80\x80\x20"), [-1] + 7 * [0]),
    ):
        assert code.decode_values(data, len(found), F4).tolist() == found


@pytest.mark.parametrize(
    "told",
    [
        np.array([7], "<u8").tobytes() + np.array([d], "<f8").tobytes() + kind
        for d, kind in (
            (np.nan, b"\2"),
            (0.0, b"\2"),
            (2.0, b"\2"),
            (0.5, b"\4"),
            (0.5, b"\3"),
            (0.5, b""),
        )
    ],
)
def test_choices_that_nobody_made(told):
    with pytest.raises(ValueError, match=r"density|kind|cut off"):
        RandomK.read_chosen(Reader(memoryview(told)), {"w": normal(8)})
