"""The universal code: integers exactly, values to half a step, bits as published."""

from functools import partial
from math import floor, log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flower_ext.core.schedules import Piecewise
from flower_ext.testing import check_codec
from flower_ext.wire import Chain, Sending, TopK, UniversalCode
from flower_ext.wire.codec import Reader
from flower_ext.wire.elias import BitReader, BitWriter

ROUNDINGS = ("nearest", "stochastic", "dithered")
NORMALIZATIONS = ("none", "mean", "max", "rms")


def coded(codec, x, seed=0):
    return codec.encode_values(x, np.random.default_rng(seed))


def there_and_back(codec, x, seed=0):
    return codec.decode_values(coded(codec, x, seed), x.size, x.dtype)


def laplace(size, seed=0):
    """Values of root mean square 1."""
    scale = 1 / np.sqrt(2)
    return np.random.default_rng(seed).laplace(0, scale, size).astype(np.float32)


# Elias's code ------------------------------------------------------------------------


def one_by_one(integers):
    """Return the code of Elias, integer by integer, as a text of bits."""
    texts = [f"{n:b}" for n in integers]
    return "".join("0" * (len(text) - 1) + text for text in texts)


@given(st.lists(st.integers(1, 2**52)), st.lists(st.booleans()))
def test_integers_come_back_in_the_bits_of_the_gamma_code(integers, flags):
    integers, flags = np.array(integers, np.int64), np.array(flags, np.bool_)
    writer = BitWriter()
    writer.gamma(integers)
    writer.flags(flags)
    writer.gamma(integers[::-1])
    packed = writer.packed()
    bits = len(one_by_one(integers))
    assert len(packed) == (2 * bits + flags.size + 7) // 8
    reader = BitReader(packed)
    assert np.array_equal(reader.gamma(integers.size, 2**53), integers)
    assert np.array_equal(reader.flags(flags.size), flags)
    assert np.array_equal(reader.gamma(integers.size, 2**53), integers[::-1])
    reader.end()


def test_the_example_of_the_order_of_bits():
    writer = BitWriter()
    writer.gamma(np.array([1, 6, 2]))
    assert writer.packed() == bytes([0b01100101, 0b00000000])


def test_a_one_is_one_bit():
    sizes = []
    for n in (1, 2, 3, 4):
        writer = BitWriter()
        writer.gamma(np.full(80, n))
        sizes.append(len(writer.packed()))
    assert sizes == [10, 30, 30, 50]


@pytest.mark.parametrize("below", [2, 8, 9])
def test_integers_out_of_range_are_refused(below):
    writer = BitWriter()
    writer.gamma(np.array([1, 9, 2]))
    with pytest.raises(ValueError, match=f"not below {below}"):
        BitReader(writer.packed()).gamma(3, below)


def test_codes_of_endless_integers_are_refused_before_they_are_read():
    with pytest.raises(ValueError, match="not below 8"):
        BitReader(b"\xff" * 100).gamma(3, 8)
    with pytest.raises(ValueError, match="cut off"):
        BitReader(b"\xff").gamma(3, 8)


# The codec ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("normalization", "rounding"),
    [
        ("none", "nearest"),
        ("none", "dithered"),
        ("mean", "stochastic"),
        ("max", "dithered"),
        ("rms", "stochastic"),
    ],
)
def test_conformance(normalization, rounding):
    check_codec(partial(UniversalCode, 0.7, normalization, rounding))


@pytest.mark.parametrize(
    ("step", "bits", "error"),
    [
        (0.25, 4.69, 0.0052),
        (0.5, 3.43, 0.0205),
        (1, 2.37, 0.0788),
        (2, 1.41, 0.269),
        (5, 0.315, 0.789),
    ],
)
def test_rates_of_values_with_a_laplace_distribution(step, bits, error):
    """Measured once with a coder that works value by value."""
    x = laplace(1_000_000)
    data = coded(UniversalCode(step), x)
    found = UniversalCode.decode_values(data, x.size, x.dtype)
    assert 8 * len(data) / x.size == pytest.approx(bits, rel=0.02)
    assert np.mean((x - found) ** 2, dtype=float) == pytest.approx(error, rel=0.02)


def entropy_of_laplace(step):
    """Return the entropy of multiples of a step, in closed form.

    Magnitudes are geometric but for the zeros, between minus half a step and half.
    """
    ratio = np.exp(-np.sqrt(2) * step)
    nonzero = np.sqrt(ratio)

    def coin(p):
        return -(p * np.log2(p) + (1 - p) * np.log2(1 - p))

    return coin(nonzero) + nonzero * (1 + coin(ratio) / (1 - ratio))


@pytest.mark.parametrize("step", [0.1, 0.5, 1, 5])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_by_entropy_they_take_little_more_than_it(step, rounding):
    x = laplace(1_000_000)
    gamma, entropy = (
        UniversalCode(step, "none", rounding, coding=y) for y in ("gamma", "entropy")
    )
    data, longer = coded(entropy, x), coded(gamma, x)
    assert len(data) < 0.9 * len(longer)
    found, expected = (
        UniversalCode.decode_values(y, x.size, x.dtype) for y in (data, longer)
    )
    assert np.array_equal(found, expected)
    if rounding == "nearest":
        bits = 8 * len(data) / x.size
        assert 1 < bits / entropy_of_laplace(step) < 1.025


def test_few_integers_have_the_code_of_elias():
    x = laplace(1000)
    gamma, entropy = (UniversalCode(0.01, coding=y) for y in ("gamma", "entropy"))
    assert coded(entropy, x) == coded(gamma, x)


# All arrays as one vector ------------------------------------------------------------


SEVERAL = {
    "a": laplace(300).reshape(20, 15),
    "b": np.zeros((30, 10), np.float32),
    "c": np.float32(0.2),
    "d": 3 * laplace(40, 1),
}


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_several_arrays_are_coded_as_one(normalization, rounding):
    """Norm and bytes are those of one array that holds all values."""
    vector = {"w": np.concatenate([x.reshape(-1) for x in SEVERAL.values()])}
    codec = UniversalCode(0.5, normalization, rounding, "global")
    sent, one = codec.encode(SEVERAL), codec.encode(vector)
    head = 4 + 1 + 2 + 4
    ours, theirs = (bytes(r["<binary>"].numpy())[head:] for r in (sent, one))
    # Which arrays are in the vector: four ones, and a single one.
    assert ours[:8] == theirs[:8] and (ours[8], theirs[8]) == (0b11110000, 0b10000000)
    assert ours[9:] == theirs[9:]
    found = codec.decode(sent, SEVERAL)
    flat = np.concatenate([x.reshape(-1) for x in found.values()])
    assert np.array_equal(flat, codec.decode(one, vector)["w"])
    assert {n: x.shape for n, x in found.items()} == {
        n: x.shape for n, x in SEVERAL.items()
    }


def test_one_vector_takes_less_than_many_small_arrays():
    many = {f"w{i:03}": laplace(5, i) for i in range(200)}
    lengths = [
        UniversalCode(1.0, scope=scope).encode(many).count_bytes()
        for scope in ("tensor", "global")
    ]
    assert lengths[1] < lengths[0] / 4


def test_what_is_no_part_of_the_vector():
    """Integers, arrays that are not finite, and what need not travel."""
    x = laplace(500)
    arrays = {
        "mask": np.float32([0, -np.inf, 0]),
        "n": np.array([1, 2, 3]),
        "nan": np.float64([np.nan, 1e-3]),
        "silent": np.zeros(10_000, np.float32),
        "w": x,
    }
    codec = UniversalCode(0.5, scope="global")
    found = codec.decode(codec.encode(arrays, Sending(silent=("silent",))), arrays)
    for name in ("mask", "n", "nan", "silent"):
        assert found[name].tobytes() == arrays[name].tobytes()
    assert np.array_equal(found["w"], there_and_back(codec, x))


def test_the_widest_precision_of_the_vector_is_that_of_its_code():
    arrays = {"a": np.float16([1, -2]), "b": np.float64([1 + 1e-12, 0])}
    codec = UniversalCode(1e-12, "none", scope="global")
    found = codec.decode(codec.encode(arrays), arrays)
    assert found["a"].dtype == np.float16 and found["a"].tolist() == [1, -2]
    assert found["b"] == pytest.approx(arrays["b"], abs=1e-12)
    assert found["b"][0] != 1


def test_bits_of_arrays_that_are_not_there_are_refused():
    payload = UniversalCode(1.0).write({"w": laplace(3)}, Sending()).parts
    data = b"".join([b"\x40", *payload[1:]])
    with pytest.raises(ValueError, match="behind the last array"):
        UniversalCode.read(Reader(memoryview(data)), {"w": laplace(3)})


integer_values = st.one_of(st.integers(-3, 3), st.integers(-(2**22), 2**22))


@given(
    arrays(np.int64, st.integers(0, 40), elements=integer_values), st.integers(0, 40)
)
def test_integers_come_back_in_the_bits_of_the_paper(integers, trailing):
    x = np.append(integers, np.zeros(trailing, np.int64)).astype(np.float32)
    data = coded(UniversalCode(1.0, "none"), x)
    assert np.array_equal(UniversalCode.decode_values(data, x.size, x.dtype), x)
    bits, zeros = 0, 0
    for n in map(int, x):
        if n:
            bits += 2 * floor(log2(zeros + 1)) + 1 + 1 + 2 * floor(log2(abs(n))) + 1
        zeros = 0 if n else zeros + 1
    assert len(data) == (9 + (bits + 7) // 8 if x.any() else 1)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_error_is_at_most_half_a_step(normalization, rounding, dtype):
    x = (3 * laplace(2000)).astype(dtype)
    wide = x.astype(np.float64)
    norm = {
        "none": 1,
        "mean": np.abs(wide).mean(),
        "max": np.abs(wide).max(),
        "rms": np.sqrt((wide**2).mean()),
    }[normalization]
    found = there_and_back(UniversalCode(0.3, normalization, rounding), x)
    error = np.abs(found.astype(np.float64) - wide)
    most = 0.3 * norm * (1 if rounding == "stochastic" else 0.5)
    slack = 4 * np.finfo(dtype).eps * np.abs(wide)
    assert (error <= most * (1 + 1e-5) + slack).all()
    assert error.max() > 0.9 * most


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_with_ever_finer_steps_the_values_come_back(rounding):
    x = laplace(300)
    errors = []
    for step in (1e-2, 1e-4, 1e-6, 1e-8, 1e-300):
        found = there_and_back(UniversalCode(step, "none", rounding), x)
        errors.append(float(np.abs(found - x).max()))
        most = step if rounding == "stochastic" else step / 2
        assert errors[-1] <= most * (1 + 1e-4) + 4e-7 * float(np.abs(x).max())
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[3:] == [0, 0]


@pytest.mark.parametrize("rounding", ["stochastic", "dithered"])
def test_random_rounding_is_right_on_average(rounding):
    """As `check_codec` sees it too, here with a variance in closed form."""
    x, draws = np.float32([0.2, -0.7, 1.5, 0.04, -2, 0]), 20_000
    codec = UniversalCode(0.5, "none", rounding)
    found = there_and_back(codec, np.tile(x, draws)).reshape(draws, -1)
    share = x / 0.5 - np.floor(x / 0.5)
    variance = share * (1 - share) if rounding == "stochastic" else 1 / 12
    deviation = 0.5 * np.sqrt(variance / draws)
    assert (np.abs(found.mean(0, dtype=float) - x) <= 5 * deviation + 1e-6).all()
    spread = found.var(0, dtype=float)
    assert spread == pytest.approx(0.25 * variance + 0 * x, rel=0.06, abs=1e-9)


def test_the_error_of_dithered_values_is_uniform_whatever_they_are():
    """The statistic of Kolmogorov and Smirnov is above 1.95 once in a thousand."""
    codec = UniversalCode(0.5, "none", "dithered")
    for x in (laplace(20_000), np.full(20_000, 0.1, np.float32)):
        error = np.sort((there_and_back(codec, x, 1) - x) / 0.5 + 0.5)
        expected = (np.arange(error.size) + 0.5) / error.size
        assert np.abs(error - expected).max() * np.sqrt(error.size) < 1.95


def test_zeros_take_one_byte_whatever_their_number():
    for rounding in ROUNDINGS:
        x = np.zeros(100_000, np.float32)
        codec = UniversalCode(0.5, "none", rounding)
        assert coded(codec, x) == b"\x01"
        assert not there_and_back(codec, x).any()
        # And values that are all rounded to zero take the head.
        x[::2] = 1e-6
        assert len(coded(codec, x)) <= 9 + 8 * (rounding == "dithered") + 8


def test_what_cannot_be_divided_by_a_step_travels_exactly():
    for x in (
        np.float32([1, np.nan, 2]),
        np.float32([1, np.inf, -np.inf, 0]),
        np.float32([1e-45, 3e38]),
        np.float64([1e300, -1e-300]),
        np.float32([1e-45]),
    ):
        for rounding in ROUNDINGS:
            codec = UniversalCode(1e-8, rounding=rounding)
            found = there_and_back(codec, x)
            assert np.array_equal(found, x, equal_nan=True)


@pytest.mark.parametrize("value", [1.5, -3e38, 1e-38])
@pytest.mark.parametrize("normalization", ["mean", "max", "rms"])
def test_one_number_is_its_own_norm(normalization, value):
    x = np.full(1, value, np.float32)
    found = there_and_back(UniversalCode(1.0, normalization), x)
    assert found == pytest.approx(x, rel=1e-6)


def test_in_a_chain_it_codes_what_was_chosen():
    x = laplace(1000)
    codec = Chain(TopK(0.1), UniversalCode(0.01))
    found = codec.decode(codec.encode({"w": x}), {"w": x})["w"]
    largest = np.argsort(-np.abs(x))[:100]
    assert np.flatnonzero(found).tolist() == sorted(largest)
    assert found[largest] == pytest.approx(x[largest], abs=0.02)


def test_the_step_may_depend_on_the_round():
    codec = UniversalCode(Piecewise({1: 1.0, 3: 0.25}))
    assert codec.at(2) == UniversalCode(1.0)
    assert codec.at(3) == UniversalCode(0.25)


def test_draws_are_those_of_the_sender():
    x = {"w": laplace(100), "v": laplace(100)}
    for rounding in ("stochastic", "dithered"):
        codec = UniversalCode(1.0, rounding=rounding)
        one, two, other = (
            codec.decode(codec.encode(x, Sending(np.random.default_rng(seed))), x)
            for seed in (0, 0, 1)
        )
        assert np.array_equal(one["w"], two["w"])
        assert not np.array_equal(one["w"], other["w"])
        assert not np.array_equal(one["w"], one["v"])  # equal values, other draws


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (partial(UniversalCode, 0), "step=0"),
        (partial(UniversalCode, -0.5), "step=-0.5"),
        (partial(UniversalCode, np.inf), "step=inf"),
        (partial(UniversalCode, "0.5"), "step='0.5'"),
        (partial(UniversalCode, lambda server_round: -1), "step=-1"),
        (partial(UniversalCode, 1, "std"), "normalization='std'"),
        (partial(UniversalCode, 1, "rms", "up"), "rounding='up'"),
        (partial(UniversalCode, 1, scope="layer"), "scope='layer'"),
        (partial(UniversalCode, 1, coding="huffman"), "coding='huffman'"),
    ],
)
def test_settings_out_of_range(make, match):
    with pytest.raises(ValueError, match=match):
        make()
