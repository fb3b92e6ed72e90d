"""A = B C, sensitivities against enumeration, and relations between mechanisms."""

import doctest
import importlib
import pkgutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flower_ext.privacy
from flower_ext.privacy import (
    BISR,
    BandedToeplitz,
    BufferedToeplitz,
    DenseFactorization,
    Identity,
    SquareRootToeplitz,
    Toeplitz,
    TreeAggregation,
    best_mechanism,
)
from flower_ext.privacy.factorizations import blt_optimizer
from flower_ext.privacy.factorizations.participation import heaviest_pattern


def random_dense(rounds, seed):
    generator = np.random.default_rng(seed)
    matrix = np.tril(generator.normal(size=(rounds, rounds)))
    np.fill_diagonal(matrix, 1 + np.abs(matrix.diagonal()))
    return DenseFactorization(matrix)


def all_factorizations(n, seed=0):
    bands = min(n, 3)
    generator = np.random.default_rng(seed)
    period = int(generator.integers(1, n + 1))
    rising = np.concatenate([[1.0], generator.normal(size=bands - 1)])
    yield Identity(n)
    yield SquareRootToeplitz(n)
    yield BandedToeplitz.optimize(n, bands)
    yield BandedToeplitz.optimize(n, bands, normalize_columns=True)
    yield Toeplitz(n, rising)
    yield BandedToeplitz(n, rising, normalize_columns=True)
    yield BufferedToeplitz(n, np.array([0.95, 0.5]), np.array([0.2, 0.3]))
    yield BufferedToeplitz(n, np.array([1.0, 0.5, 0.0]), np.array([0.1, 0.3, 0.6]))
    yield BISR(n, bands)
    yield BISR(n, bands, -generator.dirichlet(np.ones(bands))[1:])
    yield DenseFactorization.optimize(n, min(n, 2), 3)
    yield random_dense(n, seed)
    for estimator in ("online", "honaker", "full"):
        yield TreeAggregation(n, estimator=estimator)
        if estimator != "full":
            yield TreeAggregation(n, estimator=estimator, restart_every=period)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 12])
def test_decoder_times_strategy_is_the_prefix_sum(n):
    for factorization in all_factorizations(n):
        decoder, strategy = (
            factorization.decoder_matrix(),
            factorization.strategy_matrix(),
        )
        np.testing.assert_allclose(decoder @ strategy, np.tri(n), atol=1e-10)
        errors = factorization.row_errors()
        np.testing.assert_allclose((decoder**2).sum(1), errors, rtol=1e-9)
        assert factorization.max_error() == pytest.approx(np.sqrt(errors.max()))
        assert factorization.rms_error() == pytest.approx(np.sqrt(errors.mean()))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(n=st.integers(1, 20), seed=st.integers(0, 50), data=st.data())
def test_noise_variances_are_those_of_the_prefix_sums_differences(n, seed, data):
    for factorization in all_factorizations(n, seed):
        part = factorization.first(data.draw(st.integers(1, n)))
        for mechanism in (factorization, part):
            rounds = mechanism.rounds
            steps = np.diff(mechanism.decoder_matrix(), axis=0, prepend=0.0)
            found = mechanism.noise_variances()
            assert found.shape == (rounds,)
            np.testing.assert_allclose(found, (steps**2).sum(1), rtol=1e-9)
            strategy = mechanism.strategy_matrix()
            if len(strategy) == rounds:
                inverse = np.linalg.inv(strategy)
                np.testing.assert_allclose(found, (inverse**2).sum(1), rtol=1e-9)


def test_noise_variances_by_hand():
    # Node of height 1: y = z'/3 * 2 + (z_0 + z_1)/3, emitted less the left leaf z_0.
    honaker = TreeAggregation(2).noise_variances()
    np.testing.assert_allclose(honaker, [1, (2 / 3) ** 2 + (2 / 3) ** 2 + 1 / 9])
    online = TreeAggregation(8, estimator="online").noise_variances()
    np.testing.assert_allclose(online, [1, 2, 1, 3, 1, 2, 1, 4])
    root = SquareRootToeplitz(3).noise_variances()
    np.testing.assert_allclose(root, [1, 1 + 1 / 4, 1 + 1 / 4 + 1 / 64])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 12),
    separation=st.integers(1, 13),
    participations=st.integers(1, 12),
    seed=st.integers(0, 50),
)
def test_sensitivity_is_that_of_the_worst_pattern(
    enumerate_sensitivity, n, separation, participations, seed
):
    for factorization in all_factorizations(n, seed):
        matrix = factorization.strategy_matrix()
        if isinstance(factorization, TreeAggregation):
            matrix = released(factorization)
        found = factorization.sensitivity(separation, participations)
        brute = enumerate_sensitivity(matrix, separation, participations)
        if found.exact:
            assert found.value == pytest.approx(brute, rel=1e-9), factorization
            assert "bound" not in found.how
        else:
            assert found.value >= brute * (1 - 1e-12), factorization
            assert found.how.startswith("upper bound: ")


def released(factorization):
    """Return C of the prefix sums that are read, by the covariance of their noise."""
    decoder = factorization.decoder_matrix()
    root = np.linalg.cholesky(decoder @ decoder.T)
    return np.linalg.solve(root, np.tri(len(decoder)))


def test_exactness_is_claimed_where_the_theory_is_exact():
    for factorization in (
        Identity(12),
        SquareRootToeplitz(12),
        BandedToeplitz.optimize(12, 4),
        BufferedToeplitz.optimize(12, buffers=2),
        BISR(12, 3),
        BISR(12, 12),
        TreeAggregation(12, estimator="full"),
        TreeAggregation(12, restart_every=1),
    ):
        assert all(
            factorization.sensitivity(b, k).exact for b in (1, 3, 12) for k in (1, 4)
        )
    assert DenseFactorization.optimize(12, 3, 4).sensitivity(3, 4).exact
    assert not random_dense(6, 1).sensitivity(2, 2).exact


@pytest.mark.parametrize("estimator", ["online", "honaker", "full"])
@pytest.mark.parametrize("rounds", [4, 7, 12, 16])
def test_what_a_tree_releases_tells_at_most_what_its_nodes_do(estimator, rounds):
    """The release is N(A x, B B'): its sensitivity by brute force over patterns."""
    tree = TreeAggregation(rounds, estimator=estimator)
    whitened = released(tree)
    found = tree.sensitivity(3, 2)
    patterns = [(i, j) for i in range(rounds) for j in range(i + 3, rounds)]
    # Both signs: off the diagonal the whitened Gram matrix may be negative.
    worst = max(
        np.linalg.norm(whitened[:, i] + sign * whitened[:, j])
        for i, j in patterns
        for sign in (1, -1)
    )
    if estimator == "full":
        assert found.exact
        assert found.value == pytest.approx(worst, rel=1e-9)
        return
    assert not found.exact
    assert worst * (1 - 1e-12) <= found.value < 1.03 * worst
    # A client that comes once has its column of the release, and no more.
    once = tree.sensitivity(rounds, 1)
    assert once.exact
    assert once.value == pytest.approx(np.linalg.norm(whitened, axis=0).max())


@pytest.mark.parametrize("estimator", ["online", "honaker"])
@pytest.mark.parametrize(("rounds", "period"), [(64, 16), (60, 16), (37, 5), (9, 1)])
def test_a_client_that_meets_every_tree_once_is_counted_exactly(
    estimator, rounds, period
):
    tree = TreeAggregation(rounds, estimator=estimator, restart_every=period)
    gram = released(tree).T @ released(tree)
    apart = np.abs(np.subtract.outer(np.arange(rounds), np.arange(rounds))) >= period
    np.testing.assert_allclose(gram[apart], 0, atol=1e-9)
    for count in (1, 2, 9):
        found = tree.sensitivity(period, count)
        assert found.exact
        worst = heaviest_pattern(np.diagonal(gram).copy(), period, count)
        assert found.value == pytest.approx(np.sqrt(worst), rel=1e-9)
        assert found.value <= tree._of_all_nodes(period, count).value * (1 + 1e-12)


def test_a_long_tree_counts_its_nodes():
    short, long = (TreeAggregation(n).sensitivity(n, 1) for n in (1024, 1025))
    assert short.exact and not long.exact
    assert short.value < 3.1 < np.sqrt(11) == pytest.approx(long.value)


def test_crowded_tree_falls_back_to_a_named_bound():
    tree = TreeAggregation(64)
    found = tree.sensitivity(1, 64)
    # Every node full: sum over heights of 64 * 2^h.
    assert not found.exact
    assert found.value == pytest.approx(np.sqrt(64 * 127))
    assert tree.sensitivity(1, 32).value <= tree.sensitivity(1, 33).value


@pytest.mark.parametrize("n", [2, 7, 12])
def test_first_rounds_are_the_leading_rows(n, enumerate_sensitivity):
    for factorization in all_factorizations(n):
        matrix = factorization.strategy_matrix()
        for rounds in range(1, n + 1):
            part = factorization.first(rounds).strategy_matrix()
            if isinstance(factorization, TreeAggregation):
                done = ~matrix[:, rounds:].any(axis=1)
                np.testing.assert_array_equal(part, matrix[done][:, :rounds])
            else:
                np.testing.assert_allclose(part, matrix[:rounds, :rounds])
        with pytest.raises(ValueError, match="must be <="):
            factorization.first(n + 1)


@pytest.mark.parametrize("objective", ["max", "rms"])
def test_more_buffers_never_do_worse(objective):
    found = [
        BufferedToeplitz.optimize(100, 25, 4, buffers=d, objective=objective)
        for d in (1, 2, 3)
    ]
    values = [
        f.max_loss(25, 4) if objective == "max" else f.rms_loss(25, 4) for f in found
    ]
    assert values[0] >= values[1] * (1 - 1e-9) >= values[2] * (1 - 2e-9)


def test_known_order_of_mechanisms():
    n = 64
    dense = DenseFactorization.optimize(n).rms_loss(1, 1)
    others = [
        Identity(n),
        SquareRootToeplitz(n),
        BandedToeplitz.optimize(n, 32),
        BufferedToeplitz.optimize(n, buffers=2),
        TreeAggregation(n, estimator="full"),
    ]
    assert all(dense <= other.rms_loss(1, 1) for other in others)
    root = SquareRootToeplitz(n)
    for other in (
        BufferedToeplitz.optimize(n, buffers=3, objective="max"),
        BandedToeplitz.optimize(n, 64, objective="max"),
    ):
        assert other.max_loss(1, 1) >= root.max_loss(1, 1) * (1 - 1e-9)


def test_banded_inverse_is_between_independent_noise_and_the_square_root():
    root, found = SquareRootToeplitz(30), BISR(30, 30)
    np.testing.assert_allclose(found.coefficients, root.coefficients, rtol=1e-12)
    np.testing.assert_allclose(found.row_errors(), root.row_errors(), rtol=1e-12)
    assert np.array_equal(BISR(30, 1).strategy_matrix(), np.eye(30))
    # The coefficients of (1 - x)^(1/2), and of the start of their inverse.
    few = BISR(30, 4)
    taps = [1, -1 / 2, -1 / 8, -1 / 16]
    np.testing.assert_allclose(few.inverse_coefficients()[:5], [*taps, 0])
    inverse = np.linalg.inv(few.strategy_matrix())
    np.testing.assert_allclose(inverse[:, 0][:5], [*taps, 0], atol=1e-12)
    assert few.memory == 3


@pytest.mark.parametrize("objective", ["rms", "max"])
@pytest.mark.parametrize(("b", "k"), [(1, 1), (16, 4), (1, 8)])
def test_optimised_taps_are_a_minimum(b, k, objective):
    def loss(factorization):
        found = factorization.rms_loss if objective == "rms" else factorization.max_loss
        return found(b, k)

    best = BISR.optimize(64, 4, b, k, objective=objective)
    assert loss(best) <= min(loss(BISR(64, 4)), loss(Identity(64))) * (1 + 1e-9)
    # With several participations it is that of a bound, on a line to safe taps.
    slack = 1e-9 if k == 1 else 1e-3
    taps = best.inverse_coefficients()[1:4]
    for place in range(3):
        for step in (-1e-3, 1e-3):
            other = taps.copy()
            other[place] = np.clip(other[place] + step, -1, 0)
            if other.sum() >= -1:
                assert loss(BISR(64, 4, other)) >= loss(best) * (1 - slack)


def test_banded_loss_grows_with_the_root_of_participations():
    banded = BandedToeplitz.optimize(64, 8)
    assert banded.max_loss(8, 4) == pytest.approx(2 * banded.max_loss(8, 1))


def test_column_normalisation_lowers_the_error_at_equal_sensitivity():
    plain = BandedToeplitz.optimize(40, 8)
    normal = BandedToeplitz(40, plain.coefficients, normalize_columns=True)
    for k in (1, 5):
        assert normal.sensitivity(8, k).exact
        found = normal.sensitivity(8, k).value
        assert found == pytest.approx(plain.sensitivity(8, k).value, rel=1e-12)
    assert normal.rms_error() < plain.rms_error()
    norms = np.linalg.norm(normal.strategy_matrix(), axis=0)
    np.testing.assert_allclose(norms, 1.0)


def test_long_normalised_bands_have_a_named_bound():
    normal = BandedToeplitz.optimize(2100, 4, normalize_columns=True)
    found = normal.sensitivity(2, 5)
    assert not found.exact
    assert found.how.startswith("upper bound")
    plain = BandedToeplitz(2100, normal.coefficients).sensitivity(2, 5).value
    assert plain < found.value < 2 * plain


def test_restart_every_round_is_independent_noise():
    tree, identity = TreeAggregation(20, restart_every=1), Identity(20)
    np.testing.assert_allclose(tree.row_errors(), identity.row_errors())
    assert tree.sensitivity(3, 5).value == identity.sensitivity(3, 5).value


def test_one_round_is_one_gaussian():
    for factorization in all_factorizations(1):
        loss = factorization.max_loss(1, 1)
        assert loss == pytest.approx(1.0), factorization


@pytest.mark.parametrize("memory", [0, 2, 4, 70])
@pytest.mark.parametrize("objective", ["max", "rms"])
def test_best_mechanism_compares_and_fits(memory, objective):
    choice = best_mechanism(64, 16, 4, memory=memory, objective=objective)
    lines = {line.name: line for line in choice.compared}
    chosen = lines[choice.factorization.name]
    key = f"{objective}_loss"
    assert all(line.memory <= memory for line in choice.compared)
    best = min(getattr(line, key) for line in choice.compared)
    assert getattr(chosen, key) <= best * 1.001
    assert getattr(choice.compared[0], key) == best
    assert choice.factorization.name in choice.reason
    assert "identity" in lines
    if memory == 70:
        assert "dense(16 bands)" in lines or objective == "max"
        assert "square root" in lines


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Identity(0), "rounds=0 must be an integer >= 1"),
        (lambda: Identity(4).sensitivity(0, 1), "min_separation=0"),
        (lambda: Identity(4).sensitivity(1, True), "max_participations=True"),
        (lambda: BandedToeplitz.optimize(4, 5), "bands=5 must be <= rounds=4"),
        (lambda: BandedToeplitz.optimize(4, 2, objective="mean"), "objective='mean'"),
        (lambda: Toeplitz(4, np.array([0.0, 1.0])), r"coefficients\[0\]"),
        (lambda: BufferedToeplitz.optimize(9, buffers=9), "buffers=9 must be <= 8"),
        (
            lambda: BufferedToeplitz(9, np.array([0.5]), np.array([1.5])),
            "output_scale",
        ),
        (
            lambda: BufferedToeplitz(9, np.array([1.1]), np.array([0.5])),
            "buffer_decay",
        ),
        (lambda: BISR(4, 5), "bands=5 must be <= rounds=4"),
        (lambda: BISR(4, 0), "bands=0 must be an integer >= 1"),
        (lambda: BISR(4, 3, np.zeros(3)), "taps=.* must be bands - 1 = 2 finite"),
        (lambda: BISR(4, 2, np.array([0.1])), "taps=.* must be at most 0"),
        (lambda: BISR(4, 3, np.array([-0.6, -0.5])), "sum of at least -1"),
        (lambda: BISR.optimize(4, 2, objective="mean"), "objective='mean'"),
        (lambda: DenseFactorization(np.ones((3, 3))), "lower-triangular"),
        (lambda: TreeAggregation(9, estimator="top"), "estimator='top'"),
        (lambda: TreeAggregation(9, estimator="full").recurrence(), "to stream"),
        (lambda: best_mechanism(9, 3, 3, memory=-1), "memory=-1"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_docstring_examples():
    for module in pkgutil.iter_modules(flower_ext.privacy.__path__):
        loaded = importlib.import_module(f"flower_ext.privacy.{module.name}")
        assert doctest.testmod(loaded).failed == 0


@pytest.mark.parametrize(("count", "b", "n"), [(127, 2, 300), (300, 2, 700)])
def test_many_participations_are_summed_as_one_by_one(count, b, n, monkeypatch):
    logits = np.array([[3.0, 1.0, 0.5, 1.5], [9.0, -2.0, 3.0, 1.0]], complex)
    found = blt_optimizer._log_loss(logits, n, b, count, "rms").real
    monkeypatch.setattr(blt_optimizer, "_SINGLE", 10**6)
    blt_optimizer._participations.cache_clear()
    exact = blt_optimizer._log_loss(logits, n, b, count, "rms").real
    blt_optimizer._participations.cache_clear()
    np.testing.assert_allclose(found, exact, atol=2e-6 if count > 128 else 0)


def test_clients_in_every_round_are_compared_in_no_time():
    """Trees of one round each are not searched one by one."""
    choice = best_mechanism(600, 1, 600)
    assert "every 1" not in " ".join(line.name for line in choice.compared)
    every = TreeAggregation(600, restart_every=1).sensitivity(1, 600)
    assert every.exact
    assert every.value == pytest.approx(Identity(600).sensitivity(1, 600).value)
