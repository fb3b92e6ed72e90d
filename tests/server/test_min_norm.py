"""The common descent direction: closed form, brute force, and what it promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from flower_ext.server.min_norm import descent_weights, min_norm


def free(gram):
    n = len(gram)
    return min_norm(gram, np.full(n, 1 / n), np.zeros(n), np.ones(n))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-3, 3, width=32), min_size=6, max_size=6),
    st.sampled_from([1e-12, 1.0, 1e9]),
)
def test_two_vectors_in_closed_form(numbers, scale):
    v1, v2 = scale * np.array(numbers).reshape(2, 3)
    away = (v1 - v2) @ (v1 - v2)
    if away < 1e-4 * scale**2:
        return
    share = np.clip((v2 - v1) @ v2 / away, 0, 1)
    vectors = np.stack([v1, v2])
    assert free(vectors @ vectors.T) == pytest.approx([share, 1 - share], abs=1e-7)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("deviation", [0.0, 0.05, 0.3, 1.0])
def test_the_least_combination_within_bounds(seed, deviation):
    rng = np.random.default_rng(seed)
    n = 3 + seed
    vectors = rng.standard_normal((n, 8)) + 0.5
    prior = rng.dirichlet(np.ones(n))
    found = descent_weights(vectors @ vectors.T, prior, deviation)
    low, high = np.maximum(prior - deviation, 0), np.minimum(prior + deviation, 1)
    exact = minimize(
        lambda a: ((a @ vectors) ** 2).sum(),
        prior,
        bounds=list(zip(low, high, strict=True)),
        constraints={"type": "eq", "fun": lambda a: a.sum() - 1},
        options={"ftol": 1e-15, "maxiter": 500},
    )
    assert ((found @ vectors) ** 2).sum() == pytest.approx(exact.fun, rel=1e-7)
    assert found.sum() == pytest.approx(1, abs=1e-12)
    assert np.all(found >= low) and np.all(found <= high)
    if deviation == 0:
        assert found.tolist() == prior.tolist()


@pytest.mark.parametrize("size", [2, 10, 60])
def test_it_is_a_descent_direction_for_all(size):
    rng = np.random.default_rng(size)
    vectors = rng.standard_normal((size, 3 * size)) * rng.uniform(0.1, 9, (size, 1))
    direction = free(vectors @ vectors.T) @ vectors
    squared = direction @ direction
    assert squared > 0
    assert (vectors @ direction).min() >= squared * (1 - 1e-6)


def test_where_nothing_is_good_for_all_it_is_nothing():
    opposed = np.array([[1.0, 0.0], [-3.0, 0.0], [0.0, 1.0]])
    assert free(opposed @ opposed.T) == pytest.approx([0.75, 0.25, 0], abs=1e-9)
    at_rest = np.array([[1.0, 2.0], [0.0, 0.0]])
    assert free(at_rest @ at_rest.T) == pytest.approx([0, 1], abs=1e-12)
    assert free(np.zeros((3, 3))).tolist() == [1 / 3] * 3
    same = np.ones((4, 2))
    assert free(same @ same.T) == pytest.approx(np.full(4, 0.25))
