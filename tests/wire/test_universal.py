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
    ],
)
def test_settings_out_of_range(make, match):
    with pytest.raises(ValueError, match=match):
        make()
