"""Bounds, edge cases, and the direction of the adaptive norm."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flower_ext.core.contribution import Contribution, Total
from flower_ext.core.sampling import AllClients
from flower_ext.privacy import (
    AdaptiveClipping,
    FlatClipping,
    Mechanism,
    PerLayerClipping,
    PrivateSum,
    clipping_factor,
    split_clipping_norm,
    split_noise_multiplier,
    update_clipping_norm,
)

NORMS = st.dictionaries(
    st.sampled_from(["delta/w", "delta/b", "count"]),
    st.floats(0, 1e30),
    min_size=1,
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(norms=NORMS, bound=st.floats(1e-3, 1e3))
def test_flat_clipping_scales_everything_alike(norms, bound):
    factors = FlatClipping(bound).factors(norms, bound)
    norm = math.hypot(*norms.values())
    assert set(factors) == set(norms)
    assert len(set(factors.values())) == 1
    factor = factors.popitem()[1]
    assert norm * factor <= bound
    expected = 1.0 if norm <= bound else bound / norm
    assert factor == pytest.approx(expected, rel=1e-11)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(norms=NORMS, bound=st.floats(1e-3, 1e3))
def test_every_layer_has_its_bound(norms, bound):
    weights = {"delta/w": 1.0, "delta/b": 2.0, "count": 0.5}
    weights = {name: weights[name] for name in norms}
    factors = PerLayerClipping(bound, weights).factors(norms, bound)
    bounds = split_clipping_norm(bound, weights)
    for name, norm in norms.items():
        assert norm * factors[name] <= bounds[name] * (1 + 1e-12)
        assert factors[name] == 1.0 or norm > bounds[name]
    clipped = [norm * factors[name] for name, norm in norms.items()]
    assert math.hypot(*clipped) <= bound * (1 + 1e-12)


def test_layers_are_equal_unless_weighed():
    factors = PerLayerClipping(1.0).factors({"a": 10.0, "b": 0.1}, 1.0)
    assert factors == {"a": pytest.approx(math.sqrt(0.5) / 10), "b": 1.0}


LAYERS = {"w": np.zeros((3, 4), np.float32), "b": np.zeros(3), "n": np.zeros(1, int)}


def test_layers_by_size_by_hand():
    rule = PerLayerClipping.by_size(2.0, LAYERS)
    assert set(rule.weights) == {"delta/w", "delta/b"}
    factors = rule.factors({"delta/w": 10.0, "delta/b": 10.0}, 2.0)
    assert factors["delta/w"] == pytest.approx(2.0 * math.sqrt(12 / 15) / 10)
    assert factors["delta/b"] == pytest.approx(2.0 * math.sqrt(3 / 15) / 10)
    alike = {"w": np.zeros(4), "b": np.zeros((2, 2))}
    norms = {"delta/w": 7.0, "delta/b": 0.1}
    expected = PerLayerClipping(2.0).factors(norms, 2.0)
    assert PerLayerClipping.by_size(2.0, alike).factors(norms, 2.0) == expected


@settings(max_examples=40, deadline=None, derandomize=True)
@given(w=st.floats(0, 1e30), b=st.floats(0, 1e30), bound=st.floats(1e-3, 1e3))
def test_layers_by_size_never_exceed_the_norm(w, b, bound):
    norms = {"delta/w": w, "delta/b": b}
    factors = PerLayerClipping.by_size(bound, LAYERS).factors(norms, bound)
    clipped = [norm * factors[name] for name, norm in norms.items()]
    assert math.hypot(*clipped) <= bound * (1 + 1e-12)


@pytest.mark.parametrize("norm", [0.0, 0.5, 1.3, 1e6])
def test_of_one_layer_all_rules_are_flat(norm):
    one, norms = {"w": np.zeros(7)}, {"delta/w": norm}
    flat = FlatClipping(1.3).factors(norms, 1.3)
    assert PerLayerClipping(1.3).factors(norms, 1.3) == flat
    assert PerLayerClipping.by_size(1.3, one).factors(norms, 1.3) == flat


def test_epsilon_and_noise_are_those_of_flat_clipping():
    found = []
    for rule in (2.0, PerLayerClipping(2.0), PerLayerClipping.by_size(2.0, LAYERS)):
        private = private_sum(rule, noise_multiplier=1.5)
        private.open(Contribution({"delta": LAYERS}))
        released = private.release(Total())
        found.append((private.metrics(), released.arrays["delta"]["w"].tobytes()))
    assert found[0] == found[1] == found[2]
    assert found[0][0]["epsilon"] > 0


def test_arrays_without_sizes_are_refused():
    for arrays in ({}, {"n": LAYERS["n"]}, {"w": np.zeros((0, 2))}):
        with pytest.raises(
            ValueError, match="arrays=.* must be arrays of real numbers"
        ):
            PerLayerClipping.by_size(1.0, arrays)


def test_a_layer_without_a_bound_is_refused():
    for weights in ({"a": 1.0}, {"a": 1.0, "b": 1.0, "z": 1.0}):
        with pytest.raises(ValueError, match="weights="):
            PerLayerClipping(1.0, weights).factors({"a": 1.0, "b": 1.0}, 1.0)


def test_zero_and_infinity():
    assert clipping_factor(0.0, 1.0) == 1.0
    assert clipping_factor(1.0, 1.0) == 1.0
    assert clipping_factor(1e300, math.inf) == 1.0
    assert PerLayerClipping(math.inf).factors({"a": 1e9}, math.inf) == {"a": 1.0}


@pytest.mark.parametrize("kind", [FlatClipping, PerLayerClipping, AdaptiveClipping])
@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, True, "1"])
def test_bad_bounds_are_refused(kind, bound):
    with pytest.raises(ValueError, match="clipping_norm"):
        kind(bound)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clipping_norm": math.inf}, "clipping_norm=inf"),
        ({"target_quantile": 1.0}, "target_quantile=1.0"),
        ({"clip_norm_lr": -0.1}, "clip_norm_lr=-0.1"),
        ({"clipped_count_stddev": 0.0}, "clipped_count_stddev=0.0"),
    ],
)
def test_bad_adaptation_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveClipping(**{"clipping_norm": 1.0, **settings})


def test_split_norm_has_the_same_square():
    parts = split_clipping_norm(2.0, {"a": 1.0, "b": 1.0, "c": 2.0})
    assert math.hypot(*parts.values()) == pytest.approx(2.0)
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


# In a contribution ----------------------------------------------------------------


def private_sum(clipping, noise_multiplier=0):
    mechanism = Mechanism(
        num_rounds=1,
        num_sampled_clients=1,
        population_size=1,
        clipping=clipping,
        noise_multiplier=noise_multiplier,
        seed=5,
    )
    return PrivateSum(mechanism, AllClients(), {})


LAYOUT = Contribution({"delta": {"w": np.zeros(2), "b": np.zeros(1)}})


@pytest.mark.parametrize("weights", [None, {"delta/w": 1.0, "delta/b": 1.0}])
def test_what_a_contribution_lacks_is_zero(weights):
    """A client that sends less does not get the share of what it left out."""
    private = private_sum(PerLayerClipping(1.0, weights))
    private.open(LAYOUT)
    found = private.clip(Contribution({"delta": {"w": np.array([3.0, 4.0])}}))
    length = np.linalg.norm(found.arrays["delta"]["w"].numpy())
    assert length == pytest.approx(1 / math.sqrt(2))
    assert list(found.arrays["delta"]) == ["w"]


def test_bounds_for_other_pieces_are_refused_before_the_first_round():
    private = private_sum(PerLayerClipping(1.0, {"delta/w": 1.0, "delta/c": 1.0}))
    with pytest.raises(ValueError, match=r"weights=\['delta/b', 'delta/c'\]"):
        private.open(LAYOUT)
