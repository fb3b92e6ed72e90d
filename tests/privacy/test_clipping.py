"""Bounds, edge cases, and the direction of the adaptive norm."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flower_ext.privacy import (
    clip_flat,
    clip_per_layer,
    l2_norm,
    noisy_unclipped_fraction,
    split_clipping_norm,
    split_noise_multiplier,
    total_clipping_norm,
    update_clipping_norm,
)

FINITE = st.floats(-(2.0**100), 2.0**100, width=32)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    a=arrays(np.float32, 7, elements=FINITE),
    b=arrays(np.float64, (2, 2), elements=st.floats(-1e30, 1e30)),
    scalar=st.floats(-1e30, 1e30),
    bound=st.floats(1e-3, 1e3),
)
def test_norm_never_exceeds_the_bound(a, b, scalar, bound):
    clipped = clip_flat({"a": a, "b": b}, bound, {"s": scalar})
    flat = np.concatenate([a.astype(float), b.ravel(), [scalar]])
    assert clipped.norm == pytest.approx(np.linalg.norm(flat), rel=1e-12)
    assert l2_norm(clipped.arrays, clipped.scalars) <= bound
    assert clipped.unclipped == (clipped.norm <= bound)
    if clipped.unclipped:
        np.testing.assert_array_equal(clipped.arrays["a"], a)
        assert clipped.scalars == {"s": scalar}
    else:
        factor = bound / clipped.norm
        np.testing.assert_allclose(clipped.arrays["b"], b * factor, rtol=1e-6)
        assert clipped.scalars["s"] == pytest.approx(scalar * factor)
    assert clipped.arrays["a"].dtype == np.float32
    assert clipped.arrays["a"] is not a


def test_extreme_magnitudes_neither_overflow_nor_vanish():
    assert l2_norm({"x": np.full(4, 1e200)}) == pytest.approx(2e200)
    assert l2_norm({"x": np.full(4, 1e-200)}) == pytest.approx(2e-200)
    huge = clip_flat({"x": np.full(4, 1e200)}, 1.0)
    assert l2_norm(huge.arrays) == pytest.approx(1.0)
    assert l2_norm({"x": np.zeros(3), "e": np.zeros(0)}) == 0.0


def test_zero_update_and_infinite_bound_change_nothing():
    assert clip_flat({"x": np.zeros(3)}, 1.0).unclipped
    same = clip_flat({"x": np.array([3.0, 4.0])}, math.inf)
    assert same.unclipped
    np.testing.assert_array_equal(same.arrays["x"], [3.0, 4.0])


def test_input_is_left_alone():
    array = np.array([3.0, 4.0])
    clip_flat({"x": array}, 1.0)
    np.testing.assert_array_equal(array, [3.0, 4.0])


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, True, "1"])
def test_bad_bounds_are_refused(bound):
    with pytest.raises(ValueError, match="clipping_norm"):
        clip_flat({"x": np.ones(2)}, bound)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_diverged_updates_are_refused(bad):
    with pytest.raises(ValueError, match="x must be finite"):
        clip_flat({"x": np.array([1.0, bad])}, 1.0)
    with pytest.raises(ValueError, match="must be finite"):
        clip_flat({}, 1.0, {"s": bad})


def test_integer_arrays_are_refused():
    with pytest.raises(TypeError, match="int64"):
        clip_flat({"n": np.array([1, 2])}, 1.0)


def test_per_layer_bounds_and_total():
    arrays = {"a": np.array([3.0, 4.0]), "b": np.array([0.1])}
    bounds = {"a": 1.0, "b": 2.0, "s": 0.5}
    clipped = clip_per_layer(arrays, bounds, {"s": -9.0})
    assert l2_norm({"a": clipped.arrays["a"]}) == pytest.approx(1.0)
    np.testing.assert_array_equal(clipped.arrays["b"], [0.1])
    assert clipped.scalars["s"] == pytest.approx(-0.5)
    assert not clipped.unclipped
    assert l2_norm(clipped.arrays, clipped.scalars) <= total_clipping_norm(bounds)
    for wrong in ({"a": 1.0}, bounds | {"z": 1.0}):
        with pytest.raises(ValueError, match="no bound has no privacy"):
            clip_per_layer(arrays, wrong, {"s": 1.0})


def test_split_norm_has_the_same_square():
    parts = split_clipping_norm(2.0, {"a": 1.0, "b": 1.0, "c": 2.0})
    assert total_clipping_norm(parts) == pytest.approx(2.0)
    assert parts["c"] == pytest.approx(2 * parts["a"])


def follow_quantile(start, target, rounds=400):
    norms = np.random.default_rng(0).lognormal(1.0, 0.5, 500)
    norm = start
    for _ in range(rounds):
        fraction = float(np.mean(norms <= norm))
        norm = update_clipping_norm(norm, fraction, target_quantile=target)
    return norm, float(np.quantile(norms, target))


@pytest.mark.parametrize("start", [0.05, 100.0])
@pytest.mark.parametrize("target", [0.2, 0.5, 0.9])
def test_adaptive_norm_moves_to_the_quantile_from_both_sides(start, target):
    found, quantile = follow_quantile(start, target)
    assert found == pytest.approx(quantile, rel=0.05)


def test_adaptive_update_by_hand():
    # Nobody clipped: the norm is too generous; everybody clipped: too small.
    assert update_clipping_norm(1.0, 1.0) == pytest.approx(math.exp(-0.1))
    assert update_clipping_norm(1.0, 0.0) == pytest.approx(math.exp(0.1))
    assert update_clipping_norm(3.0, 0.5) == 3.0
    assert update_clipping_norm(3.0, 0.9, learning_rate=0.0) == 3.0


def test_noisy_fraction_by_hand():
    assert noisy_unclipped_fraction(3, 4, 4, 0.0) == pytest.approx(0.75)
    assert noisy_unclipped_fraction(3, 4, 4, 2.0) == pytest.approx(1.25)
    # One client more, clipped or not, moves the numerator by one half.
    base = noisy_unclipped_fraction(3, 6, 10, 0.0)
    for bit in (0, 1):
        moved = noisy_unclipped_fraction(3 + bit, 7, 10, 0.0)
        assert abs(moved - base) == pytest.approx(0.5 / 10)
    with pytest.raises(ValueError, match="unclipped=5"):
        noisy_unclipped_fraction(5, 4, 4, 0.0)


def test_noise_split_adds_up():
    # Two Gaussian releases with mu_1, mu_2 are one with sqrt(mu_1^2 + mu_2^2).
    z, count = 1.1, 5.0
    left = split_noise_multiplier(z, count)
    assert left > z
    assert left**-2 + (2 * count) ** -2 == pytest.approx(z**-2)
    with pytest.raises(ValueError, match="count_noise_std=0.5"):
        split_noise_multiplier(1.0, 0.5)
    with pytest.raises(ValueError, match="noise_multiplier=nan"):
        split_noise_multiplier(math.nan, 1.0)
