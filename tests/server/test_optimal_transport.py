"""Optimal transport: its marginals, and what independent solvers find."""

import re

import numpy as np
import pytest
from scipy.optimize import linprog

from flower_ext.server.optimal_transport import transport


def problem(seed, n=6, m=3):
    rng = np.random.default_rng(seed)
    rows, columns = rng.dirichlet(np.ones(n)), rng.dirichlet(np.ones(m))
    return rng.standard_normal((n, m)), m * rows, m * columns


def kernel_iterations(cost, rows, columns, regularization, count=20_000):
    """Sinkhorn's matrix scaling as it is written in the textbook."""
    kernel = np.exp(-cost / regularization)
    v = np.ones(len(columns))
    for _ in range(count):
        u = rows / (kernel @ v)
        v = columns / (kernel.T @ u)
    return u[:, None] * kernel * v


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("regularization", [1e-8, 1e-3, 0.1, 1.0, 1e9])
def test_marginals_hold(seed, regularization):
    cost, rows, columns = problem(seed)
    plan = transport(cost, rows, columns, regularization)
    assert plan.min() >= 0
    assert np.abs(plan.sum(1) - rows).max() < 1e-12
    assert np.abs(plan.sum(0) - columns).max() < 1e-12


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("regularization", [0.3, 1.0, 10.0])
def test_it_is_the_textbooks_plan(seed, regularization):
    arguments = (*problem(seed), regularization)
    expected = kernel_iterations(*arguments)
    assert transport(*arguments) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_a_small_entropy_is_the_linear_program(seed):
    cost, rows, columns = problem(seed)
    n, m = cost.shape
    sums = np.vstack([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    exact = linprog(cost.ravel(), A_eq=sums, b_eq=np.r_[rows, columns])
    plan = transport(cost, rows, columns, 1e-3)
    assert (plan * cost).sum() == pytest.approx(exact.fun, abs=2e-3)
    assert (plan * cost).sum() >= exact.fun - 1e-12


def test_a_large_entropy_is_independence():
    cost, rows, columns = problem(1)
    plan = transport(cost, rows, columns, 1e9)
    assert plan == pytest.approx(np.outer(rows, columns) / rows.sum(), abs=1e-8)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e12])
def test_as_many_models_as_clients_are_a_permutation(scale):
    rng = np.random.default_rng(0)
    order = rng.permutation(5)
    cost = rng.uniform(1, 2, (5, 5))
    cost[np.arange(5), order] = 0.0
    plan = transport(scale * cost, np.ones(5), np.ones(5), 0.01 * scale)
    assert plan == pytest.approx(np.eye(5)[order], abs=1e-9)


def test_a_constant_for_a_client_or_a_model_changes_nothing():
    cost, rows, columns = problem(2)
    moved = cost + np.arange(6.0)[:, None] - np.arange(3.0)
    expected = transport(cost, rows, columns, 0.5)
    assert transport(moved, rows, columns, 0.5) == pytest.approx(expected, abs=1e-10)


def test_equal_costs_share_alike_and_no_mass_has_no_part():
    rows, columns = np.array([1.0, 0.0, 2.0]), np.array([0.0, 3.0])
    plan = transport(np.zeros((3, 2)), rows, columns, 0.1)
    assert plan.tolist() == [[0, 1], [0, 0], [0, 2]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cost": [[np.inf, 0.0], [0.0, 0.0]]}, "must be finite: a model that diver"),
        ({"rows": [1.0, 1.0, 1.0]}, "must be 2 finite numbers >= 0"),
        ({"rows": [3.0, -1.0]}, "must be 2 finite numbers >= 0"),
        ({"columns": [1.0, np.nan]}, "columns=[1.0, nan] must be 2 finite"),
        ({"columns": [1.0, 1.5]}, "must be of the sum of the rows, 2 > 0"),
        ({"rows": [0.0, 0.0], "columns": [0.0, 0.0]}, "of the sum of the rows, 0 > 0"),
        ({"regularization": 0.0}, "regularization=0.0 must be a finite number > 0"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(change, words):
    usual = {"cost": np.eye(2), "rows": np.ones(2), "columns": np.ones(2)}
    arguments = {
        k: np.array(x) if k != "regularization" else x for k, x in change.items()
    }
    with pytest.raises(ValueError, match=re.escape(words)):
        transport(**{**usual, "regularization": 0.1, **arguments})
