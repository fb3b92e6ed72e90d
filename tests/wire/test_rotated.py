"""EDEN and DRIVE: the errors that theory expects, whatever is encoded."""

import struct
from functools import partial
from math import ceil, pi

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from flower_ext import AdditiveStrategy
from flower_ext.client.encoding import encoded
from flower_ext.core.arrays import from_record, to_record
from flower_ext.core.replies import MalformedReply
from flower_ext.simulation import LocalGrid
from flower_ext.wire import DRIVE, EDEN, Chain, ErrorFeedback, Exact, Sending, TopK
from flower_ext.wire.codec import PAYLOAD, Reader
from flower_ext.wire.rotated import _Rotation, _spans, _uniform_rotation, lloyd_max
from flower_ext.wire.traffic import serialized_bytes
from flower_ext.wire.wrappers import upload

# Max 1960, "Quantizing for minimum distortion", table I, at 2, 4, 8 and 16 levels.
PUBLISHED = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


def normal(size, seed=0):
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def there_and_back(codec, x, seed=0):
    sending = Sending(np.random.default_rng(seed))
    return codec.decode(codec.encode({"w": x}, sending), {"w": x})["w"]


def energy(x):
    return float((x.astype(np.float64) ** 2).sum())


def sparse(size, **values):
    x = np.zeros(size, np.float32)
    for place, value in values.items():
        x[int(place[1:])] = value
    return x


# The quantiser --------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(9))
def test_each_level_is_the_mean_of_what_is_nearest_to_it(bits):
    levels = lloyd_max(bits)
    assert len(levels) == 2**bits and (np.diff(levels) > 0).all()
    assert np.array_equal(levels, -levels[::-1])
    edges = [-np.inf, *(levels[1:] + levels[:-1]) / 2, np.inf]
    for i in {0, len(levels) // 3, len(levels) // 2, len(levels) - 1}:
        mass = quad(norm.pdf, edges[i], edges[i + 1])[0]
        mean = quad(lambda z: z * norm.pdf(z), edges[i], edges[i + 1])[0] / mass
        assert levels[i] == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize("bits", PUBLISHED)
def test_the_error_of_the_levels_is_the_published_one(bits):
    levels = lloyd_max(bits)
    mass = np.diff(norm.cdf([-np.inf, *(levels[1:] + levels[:-1]) / 2, np.inf]))
    assert 1 - mass @ levels**2 == pytest.approx(PUBLISHED[bits], rel=1e-3)


def test_one_bit_is_the_mean_magnitude_of_a_normal_number():
    assert lloyd_max(1) == pytest.approx([-((2 / pi) ** 0.5), (2 / pi) ** 0.5])


# Errors ---------------------------------------------------------------------------


def expected_error(bits, unbiased):
    low = int(bits)
    distortions = {0: 1, **PUBLISHED}
    least = distortions[low]
    if bits > low:
        share = bits - low
        least = (1 - share) * least + share * distortions[low + 1]
    return least / (1 - least) if unbiased else least


@pytest.mark.parametrize("bits", [*PUBLISHED, 0.25, 0.5, 1.5, 2.25])
@pytest.mark.parametrize("unbiased", [True, False])
def test_the_error_is_the_expected_share_of_the_energy(bits, unbiased):
    x = normal(1 << 17) ** 5
    found = there_and_back(EDEN(bits, unbiased), x)
    error = energy(found - x) / energy(x)
    assert error == pytest.approx(expected_error(bits, unbiased), rel=0.025)


def test_of_one_bit_it_is_half_pi_less_one():
    assert expected_error(1, True) == pytest.approx(pi / 2 - 1, rel=1e-3)


VECTORS = {
    "two large ones": sparse(512, x3=3, x7=1),
    "two large ones, in different rows": sparse(512, x3=3, x67=1),
    "two large ones of few": sparse(128, x3=3, x67=1),
    "four large ones": sparse(512, x3=4, x67=3, x100=2, x90=1),
    "one": sparse(512, x5=2),
    "all alike": np.ones(512, np.float32),
    "a ramp": np.arange(512, dtype=np.float32),
    "heavy tails": normal(512) ** 7,
}


@pytest.mark.parametrize("name", VECTORS)
def test_the_error_of_the_mean_of_clients_falls_with_their_number(name):
    """For vectors that are far from normal, too, to one after a single transform."""
    x, clients = VECTORS[name], 300
    found = np.stack([there_and_back(DRIVE(), x, seed) for seed in range(clients)])
    each = np.mean([energy(y - x) for y in found]) / energy(x)
    assert each == pytest.approx(pi / 2 - 1, rel=0.07)
    # The squared norm of a mean of many coordinates varies by a tenth or so; where few
    # are large, by more.
    mean = energy(found.astype(np.float64).mean(0) - x) / energy(x)
    assert mean == pytest.approx((pi / 2 - 1) / clients, rel=0.35)


@pytest.mark.parametrize("size", [1, 2, 7, 65])
@pytest.mark.parametrize("bits", [0.25, 1, 2])
def test_the_mean_is_what_was_encoded(size, bits):
    x, draws = normal(size, 3) ** 3, 300
    found = [there_and_back(EDEN(bits), x, seed) for seed in range(draws)]
    error = np.abs(np.mean(found, axis=0, dtype=np.float64) - x)
    allowed = 5 * np.std(found, axis=0, dtype=np.float64) / draws**0.5
    assert (error <= allowed + 1e-6 * np.abs(x).max()).all()


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(1, 9000), st.sampled_from([0.5, 1, 2, 2.5, 4]), st.integers(0, 99))
def test_the_scales_are_the_unbiased_one_and_the_one_of_least_error(size, bits, seed):
    """Of each block: what comes back has the right projection, or a minimal error."""
    x = normal(size, seed)
    found = there_and_back(EDEN(bits), x, seed).astype(np.float64)
    assert found @ x == pytest.approx(energy(x), rel=1e-4)
    least = there_and_back(EDEN(bits, unbiased=False), x, seed).astype(np.float64)
    assert least @ x == pytest.approx(energy(least), rel=1e-4)
    assert energy(least - x) <= energy(x)


def test_drive_is_the_paper():
    """The signs of the turned vector, times its squared norm over its first norm."""
    x = normal(256)
    record = DRIVE().encode({"w": x})
    (seed,) = struct.unpack_from("<Q", bytes(record[PAYLOAD].numpy()), 4 + 1 + 2 + 12)
    turned = _Rotation(seed).forth(x[None])[0]
    scale = energy(x) / np.abs(turned).sum()
    expected = _Rotation(seed).back(scale * np.sign(turned)[None])[0]
    found = DRIVE().decode(record, {"w": x})["w"]
    assert found == pytest.approx(expected, abs=1e-5)
    assert record == EDEN(1).encode({"w": x})
    least = DRIVE(unbiased=False)
    assert least.encode({"w": x}) == EDEN(1, unbiased=False).encode({"w": x})


# The rotation ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (1, 63), (3, 64), (2, 512)])
def test_a_rotation_keeps_norms_and_can_be_undone(shape):
    x = normal(shape)
    turned = _Rotation(4).forth(x)
    assert (turned**2).sum(1) == pytest.approx((x**2).sum(1), rel=1e-5)
    assert _Rotation(4).back(turned) == pytest.approx(x, abs=1e-5)
    assert not np.allclose(_Rotation(5).forth(x), turned) or x.size == 1


def test_uniform_rotations_turn_to_all_sides():
    """Each entry is zero on average, with the variance of a coordinate of a sphere."""
    bits, draws = np.random.PCG64(0), 1000
    found = np.stack([_uniform_rotation(bits, 3) for _ in range(draws)])
    assert np.abs(found.mean(0)).max() <= 5 / (3 * draws) ** 0.5
    assert (found**2).mean(0) == pytest.approx(1 / 3, abs=0.05)
    product = found @ found.transpose(0, 2, 1)
    assert product == pytest.approx(np.broadcast_to(np.eye(3), product.shape), abs=1e-6)


def test_blocks_are_turned_by_different_signs():
    x = np.tile(normal(64), (2, 1))
    one, two = _Rotation(0).forth(x)
    assert not np.allclose(np.abs(one), np.abs(two))


def test_equal_draws_give_equal_bytes_and_others_do_not():
    x = {"w": normal(300)}
    records = [EDEN(2).encode(x, Sending(np.random.default_rng(i))) for i in (1, 1, 2)]
    assert records[0] == records[1] != records[2]


# Bytes ----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4, 0.5, 1.5])
def test_bytes_as_flower_serialises_them(bits):
    """Nothing is padded: 16 bytes, then 4 a block and the codes of its values."""
    sizes = {"a": [4096] * 2 + [2048, 64, 36], "b": [8], "none": []}
    arrays = {name: normal(sum(blocks)) for name, blocks in sizes.items()}
    arrays["n"] = np.array([3, 4])
    length = 4 + 1 + 2 + 12 + 16 + arrays["n"].nbytes
    for blocks in (*[[x] for x in sizes["a"][2:] + sizes["b"]], sizes["a"][:2]):
        length += 4 * len(blocks)
        for span, each in _spans(bits, blocks[0]):
            length += ceil(len(blocks) * each * (span.stop - span.start) / 8)
    record = EDEN(bits).encode(arrays)
    assert record[PAYLOAD].shape == (length,)
    dense = Exact().encode(arrays)
    serialised = [serialized_bytes(RecordDict({"arrays": x})) for x in (record, dense)]
    saved = dense[PAYLOAD].shape[0] - length
    # Lengths are written in fewer bytes, too.
    assert serialised[1] - serialised[0] == pytest.approx(saved, abs=8)
    if bits >= 1:
        assert length < sum(x.size for x in arrays.values()) * bits / 8 + 100


def test_the_first_coordinates_have_one_bit_more():
    assert _spans(2, 64) == [(slice(0, 64), 2)]
    assert _spans(2.25, 64) == [(slice(0, 16), 3), (slice(16, 64), 2)]
    assert _spans(0.75, 64) == [(slice(0, 48), 1), (slice(48, 64), 0)]
    assert _spans(1.01, 64) == [(slice(0, 1), 2), (slice(1, 64), 1)]
    assert _spans(1 / 64, 10) == [(slice(0, 10), 1)]


# Edges ----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0.25, 1, 3])
def test_zeros_single_values_and_nothing(bits):
    codec = EDEN(bits)
    assert not there_and_back(codec, np.zeros(9000, np.float32)).any()
    assert there_and_back(codec, np.zeros((0, 3), np.float32)).shape == (0, 3)
    for value in (-2.5, 1e-37, 2e38):
        one = np.array(value, np.float32)
        assert there_and_back(codec, one) == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("power", [-100, 110])
@pytest.mark.parametrize("codec", [DRIVE(), EDEN(2.5), EDEN(4, unbiased=False)])
def test_a_power_of_two_changes_nothing_but_the_scale(codec, power):
    """Bit for bit, so neither sums of squares too large nor those too small matter."""
    x = normal(300)
    factor = np.float32(2.0**power)
    assert np.array_equal(
        there_and_back(codec, x * factor), there_and_back(codec, x) * factor
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("bits", [0.5, 1, 2])
def test_a_block_that_is_not_finite_comes_back_as_nan(bad, bits):
    x = normal(3 * 4096)
    x[5000] = bad
    finite = np.isfinite(there_and_back(EDEN(bits), x)).reshape(3, -1)
    assert finite.all(1).tolist() == [True, False, True]
    assert not finite[1].any()


def test_what_float32_cannot_hold_is_not_finite():
    assert np.isnan(there_and_back(EDEN(2), np.array([1.0, 1e300]))).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_precisions(dtype):
    x = normal(2000).astype(dtype)
    found = there_and_back(EDEN(4), x)
    assert found.dtype == dtype
    assert energy(found - x) / energy(x) == pytest.approx(0.0096, rel=0.1)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (partial(EDEN, 0), "bits=0"),
        (partial(EDEN, 0.001), "bits=0.001"),
        (partial(EDEN, 9), "bits=9"),
        (partial(EDEN, float("nan")), "bits=nan"),
        (partial(EDEN, 1, "yes"), "unbiased='yes'"),
        (partial(DRIVE, 1), "unbiased=1"),
    ],
)
def test_settings_out_of_range(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("bits", [0, -1, 9, np.nan, np.inf])
def test_bits_that_nobody_writes(bits):
    data = struct.pack("<Qd", 1, bits) + bytes(100)
    with pytest.raises(ValueError, match="bits, must be"):
        EDEN.read(Reader(memoryview(data)), {"w": np.ones(8, np.float32)})


def test_nothing_comes_behind_it():
    codec = Chain(TopK(0.5), EDEN(2))
    record = codec.encode({"w": normal(8)})
    with pytest.raises(MalformedReply):
        EDEN(2).decode(record, {"w": normal(8)})


# With others ----------------------------------------------------------------------


def test_error_feedback_makes_up_for_it():
    """A residual is at most sqrt(D) / (1 - sqrt(D)) of a change that stays the same."""
    x, rounds = normal(5000), 25
    codec, kept = ErrorFeedback(EDEN(1, unbiased=False)), None
    total = np.zeros(5000)
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        record, kept, _ = upload(codec, {"w": x}, kept, Sending(rng))
        total += codec.decode(record, {"w": x})["w"]
    root = PUBLISHED[1] ** 0.5
    assert total + kept["w"] == pytest.approx(rounds * x, abs=1e-3)
    assert energy(total / rounds - x) <= (
        1.1 * (root / (1 - root) / rounds) ** 2 * energy(x)
    )


def test_the_values_of_a_chain():
    x = normal(40_000)
    codec = Chain(TopK(0.25), EDEN(2))
    found = there_and_back(codec, x)
    chosen = there_and_back(TopK(0.25), x)
    assert np.array_equal(found != 0, chosen != 0)
    error = energy(found - chosen) / energy(chosen)
    assert error == pytest.approx(expected_error(2, True), rel=0.05)


@pytest.mark.parametrize("bits", [1, 4])
def test_a_round_of_federated_averaging(bits):
    """The error of the mean is that of one client, over their number."""
    clients, size = 8, 20_000
    start = {"w": normal(size, 99)}
    app = ClientApp(mods=[encoded()])

    @app.train()
    def train(message, context):
        arrays = from_record(message.content["arrays"])
        change = normal(size, context.node_config["partition-id"])
        content = {
            "arrays": to_record({"w": arrays["w"] + change}),
            "metrics": MetricRecord({"num-examples": 1}),
        }
        return Message(RecordDict(content), reply_to=message)

    def run(codec):
        strategy = AdditiveStrategy(upload=codec, fraction_evaluate=0.0)
        grid = LocalGrid(app, clients)
        result = strategy.start(
            grid, to_record(start), num_rounds=1, train_config=ConfigRecord()
        )
        return from_record(result.arrays)["w"]

    error = energy(run(EDEN(bits)) - run(None))
    one = expected_error(bits, True) * size
    assert error == pytest.approx(one / clients, rel=0.1)
