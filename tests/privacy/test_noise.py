"""Streams against dense solves, covariance, resuming, chunks."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flower_ext.privacy import (
    BISR,
    BandedToeplitz,
    BufferedToeplitz,
    DenseFactorization,
    Identity,
    NoiseStream,
    SquareRootToeplitz,
    TreeAggregation,
)

SHAPES = {"w": (3, 2), "b": (), "empty": (0,), "v": (4,)}


def makers(n):
    bands = min(n, 4)
    return {
        "identity": lambda: Identity(n),
        "root": lambda: SquareRootToeplitz(n),
        "banded": lambda: BandedToeplitz.optimize(n, bands),
        "normalised": lambda: BandedToeplitz.optimize(n, bands, normalize_columns=True),
        "blt": lambda: BufferedToeplitz(
            n, np.array([0.99, 0.7, 0.1]), np.array([0.1, 0.3, 0.2])
        ),
        "bisr": lambda: BISR(n, bands),
        "dense": lambda: DenseFactorization.optimize(n),
        "dense-banded": lambda: DenseFactorization.optimize(n, min(3, n), 2),
        "tree-online": lambda: TreeAggregation(n, estimator="online"),
        "tree-honaker": lambda: TreeAggregation(n),
        "tree-restart": lambda: TreeAggregation(n, restart_every=max(1, n // 3)),
    }


def streaming(n, kind):
    return makers(n)[kind]()


KINDS = tuple(makers(1))


def run(factorization, rounds=None, **options):
    options = {"seed": 5, "dtype": "float64"} | options
    stream = NoiseStream(factorization, SHAPES, **options)
    rounds = factorization.rounds if rounds is None else rounds
    rows = []
    for _ in range(rounds):
        noise = stream.next()
        assert {k: v.shape for k, v in noise.items()} == SHAPES
        rows.append(np.concatenate([v.ravel() for v in noise.values()]))
    return np.array(rows)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(n=st.integers(1, 24), seed=st.integers(0, 2**40))
def test_stream_equals_dense_solve(kind, n, seed):
    factorization = streaming(n, kind)
    recurrence = factorization.recurrence()
    generator = np.random.default_rng(seed)
    state = np.zeros((recurrence.buffers, 5))
    fresh, noise = [], []
    for step in range(n):
        draws = generator.normal(size=(recurrence.draws(step), 5))
        fresh.append(draws.copy())
        noise.append(recurrence.advance(step, draws, state).copy())
    if kind.startswith("tree"):
        # Noise of a round = difference of the noise of two prefix sums, B z.
        decoder = factorization.decoder_matrix()
        if kind == "tree-online":  # only the tallest node of a round is read
            decoder = decoder[:, decoder.any(axis=0)]
        expected = np.diff(decoder @ np.concatenate(fresh), axis=0, prepend=0.0)
    else:
        matrix = factorization.strategy_matrix()
        expected = np.linalg.solve(matrix, np.concatenate(fresh))
    np.testing.assert_allclose(noise, expected, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_covariance_is_that_of_the_mechanism(kind):
    n, size = 7, 100_000
    factorization = streaming(n, kind)
    stream = NoiseStream(factorization, {"x": (size,)}, seed=11)
    rows = np.array([stream.next(2.0)["x"] for _ in range(n)], dtype=np.float64)
    increments = np.diff(factorization.decoder_matrix(), axis=0, prepend=0.0)
    expected = 4.0 * increments @ increments.T
    assert_covariance(rows, expected, bound=5.0)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_variances_are_those_of_the_stream(kind):
    n, size = 40, 20_000
    factorization = streaming(n, kind)
    stream = NoiseStream(factorization, {"x": (size,)}, seed=12)
    rows = np.array([stream.next(0.5)["x"] for _ in range(n)], dtype=np.float64)
    found = (rows**2).mean(axis=1) / 0.25
    # The mean of squares has a relative error of sqrt(2 / size); 5 standard errors.
    expected = factorization.noise_variances()
    np.testing.assert_allclose(found, expected, rtol=5 * np.sqrt(2 / size))


def assert_covariance(rows, expected, bound):
    """|z| of every entry; an entry has variance (S_ii S_jj + S_ij^2) / samples."""
    size = rows.shape[1]
    found = rows @ rows.T / size
    scale = np.outer(np.diag(expected), np.diag(expected)) + expected**2
    assert np.abs((found - expected) / np.sqrt(scale / size)).max() < bound
    means = rows.mean(axis=1) / np.sqrt(np.diag(expected) / size)
    assert np.abs(means).max() < bound


def test_secure_noise_has_the_same_law():
    factorization = streaming(5, "blt")
    stream = NoiseStream(factorization, {"x": (100_001,)}, secure=True)
    rows = np.array([stream.next()["x"] for _ in range(5)], dtype=np.float64)
    inverse = np.linalg.inv(factorization.strategy_matrix())
    assert_covariance(rows, inverse @ inverse.T, bound=7.0)
    first = rows[0]
    # P(|z| > 2) = 0.0455, four standard errors of the count.
    tail = np.mean(np.abs(first) > 2)
    assert abs(tail - 0.0455) < 6 * np.sqrt(0.0455 / first.size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_noise_does_not_depend_on_the_chunk(kind, dtype):
    factorization = streaming(9, kind)
    rows = [run(factorization, chunk=chunk, dtype=dtype) for chunk in (1, 3, 10**6)]
    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(rows[0], rows[2])


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_stream_continues_bit_for_bit(kind):
    factorization = streaming(9, kind)
    whole = NoiseStream(factorization, SHAPES, seed=3)
    expected = [whole.next(0.7) for _ in range(9)]
    for stop in (0, 1, 4, 9):
        before = NoiseStream(factorization, SHAPES, seed=3)
        for _ in range(stop):
            before.next(0.7)
        state = before.state_dict()
        scalars = {k: v for k, v in state.items() if not isinstance(v, np.ndarray)}
        state = json.loads(json.dumps(scalars)) | {"buffers": state["buffers"]}
        after = NoiseStream(streaming(9, kind), SHAPES, seed=3, chunk=2)
        after.load_state_dict(state)
        if stop < 9:
            before.next(0.7)  # the state was a copy
        assert after._round == stop
        for step in range(stop, 9):
            for name, value in after.next(0.7).items():
                np.testing.assert_array_equal(value, expected[step][name])


def test_resumed_secure_stream_keeps_the_correlation():
    factorization = streaming(4, "root")
    stream = NoiseStream(factorization, {"x": (50_000,)}, secure=True)
    rows = [stream.next()["x"] for _ in range(2)]
    resumed = NoiseStream(factorization, {"x": (50_000,)}, secure=True)
    resumed.load_state_dict(stream.state_dict())
    rows += [resumed.next()["x"] for _ in range(2)]
    inverse = np.linalg.inv(factorization.strategy_matrix())
    assert_covariance(np.array(rows, np.float64), inverse @ inverse.T, bound=7.0)
    assert not np.array_equal(stream.next()["x"], rows[2])


@pytest.mark.parametrize("kind", ["blt", "banded", "root", "tree-honaker"])
def test_float32_stays_close_to_float64(kind):
    factorization = streaming(300, kind)
    exact = run(factorization)
    rounded = run(factorization, dtype="float32")
    assert rounded.dtype == np.float32
    assert np.abs(exact - rounded).max() < 2e-6


def test_decay_near_one_survives_float32():
    factorization = BufferedToeplitz(2000, np.array([1 - 1e-9]), np.array([0.3]))
    difference = run(factorization) - run(factorization, dtype="float32")
    assert np.abs(difference).max() < 2e-6


def test_seeds_rounds_and_draws_are_independent():
    rows = run(Identity(50))
    assert len(np.unique(rows)) == rows.size
    assert not np.intersect1d(rows, run(Identity(50), seed=6)).size


def test_scale_is_linear_and_zero_is_exact():
    factorization = streaming(6, "blt")
    one = run(factorization)
    stream = NoiseStream(factorization, SHAPES, seed=5, dtype="float64")
    np.testing.assert_array_equal(stream.next(2.0)["w"].ravel(), 2 * one[0][:6])
    silent = NoiseStream(factorization, SHAPES, seed=5)
    for _ in range(6):
        assert all(not value.any() for value in silent.next(0.0).values())


def test_scale_changes_only_at_a_restart():
    stream = NoiseStream(TreeAggregation(6, restart_every=3), SHAPES, seed=0)
    for _ in range(3):
        stream.next(1.0)
    stream.next(0.5)
    with pytest.raises(ValueError, match="only at a restart"):
        stream.next(1.0)
    stream = NoiseStream(Identity(3), SHAPES, seed=0)
    stream.next(1.0)
    stream.next(2.0)
    stream = NoiseStream(streaming(3, "blt"), SHAPES, seed=0)
    stream.next(1.0)
    with pytest.raises(ValueError, match=r"standard_deviation=2.0 must be 1.0"):
        stream.next(2.0)


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf"), True])
def test_bad_scale_is_refused(scale):
    with pytest.raises(ValueError, match="standard_deviation"):
        NoiseStream(Identity(3), SHAPES, seed=0).next(scale)


def test_no_noise_after_the_plan():
    stream = NoiseStream(Identity(1), SHAPES, seed=0)
    stream.next()
    with pytest.raises(ValueError, match="plan the mechanism"):
        stream.next()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("factorization", "x"),
        ("seed", "4"),
        ("secure", True),
        ("sizes", "1"),
        ("schema", 0),
        ("round", -1),
        ("round", 10),
        ("standard_deviation", float("nan")),
        ("buffers", np.zeros((1, 11), np.float32)),
        ("buffers", np.full((3, 11), np.nan, np.float32)),
        ("buffers", np.zeros((3, 11))),
    ],
)
def test_foreign_state_is_refused(key, value):
    stream = NoiseStream(streaming(9, "blt"), SHAPES, seed=3)
    state = stream.state_dict()
    with pytest.raises(ValueError, match=key):
        stream.load_state_dict(state | {key: value})
    with pytest.raises(ValueError, match="missing"):
        stream.load_state_dict({k: v for k, v in state.items() if k != key})


def test_seed_or_secure():
    for options in ({}, {"seed": 1, "secure": True}):
        with pytest.raises(ValueError, match="not both"):
            NoiseStream(Identity(3), SHAPES, **options)
    with pytest.raises(ValueError, match="seed=-1"):
        NoiseStream(Identity(3), SHAPES, seed=-1)
    with pytest.raises(ValueError, match="shapes"):
        NoiseStream(Identity(3), {}, seed=1)


def test_memory_is_buffers_plus_one_model():
    size = 1_000_000
    tracemalloc.start()
    stream = NoiseStream(streaming(9, "blt"), {"x": (size,)}, seed=0)
    stream.next()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (stream._factorization.memory + 2) * 4 * size
