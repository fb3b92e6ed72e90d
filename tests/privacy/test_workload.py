"""Workloads: the server's SGD as a matrix, and noise that is chosen for it."""

import numpy as np
import pytest

from flower_ext.core.sampling import MinSeparationSampler
from flower_ext.core.schedules import Cosine, Linear, Piecewise, WarmUp
from flower_ext.privacy import (
    BISR,
    BandedToeplitz,
    BufferedToeplitz,
    DenseFactorization,
    Identity,
    Mechanism,
    SquareRootToeplitz,
    TreeAggregation,
    Workload,
    best_mechanism,
)
from flower_ext.privacy.factorizations.banded import _measure
from flower_ext.privacy.factorizations.blt_optimizer import _interlace, _log_loss
from flower_ext.privacy.factorizations.workload import PREFIX_SUMS
from flower_ext.server.optimizers import SGD
from flower_ext.strategies import DPFTRL

HEAVY_BALL = Workload(momentum=0.9)
COOLDOWN = Workload(momentum=0.9, learning_rates=Linear(1.0, rounds=16, final=0.1))
SERVERS = [
    PREFIX_SUMS,
    HEAVY_BALL,
    Workload(momentum=0.5, nesterov=True),
    Workload(momentum=1.0),
    Workload(learning_rates=WarmUp(4, Cosine(1.0, rounds=12))),
    COOLDOWN,
    Workload(0.7, True, Piecewise({1: 1.0, 9: 0.25})),
]
PLAN = {
    "num_rounds": 64,
    "num_sampled_clients": 4,
    "population_size": 64,
    "min_separation": 16,
    "target_delta": 1e-3,
}


def mechanisms(n):
    yield Identity(n)
    yield SquareRootToeplitz(n)
    yield BandedToeplitz.optimize(n, 3)
    yield BandedToeplitz.optimize(n, 3, normalize_columns=True)
    yield BufferedToeplitz(n, np.array([0.95, 0.5]), np.array([0.2, 0.3]))
    yield BISR(n, 3)
    yield DenseFactorization.optimize(n, 4, 3)
    for estimator in ("online", "honaker", "full"):
        yield TreeAggregation(n, estimator=estimator)
        yield TreeAggregation(n, estimator=estimator, restart_every=5)


@pytest.mark.parametrize("workload", SERVERS, ids=str)
def test_its_matrix_is_what_the_server_does_with_unit_impulses(workload):
    n = 16
    rates = workload.rates(n)
    for place in range(n):
        optimizer = SGD(1.0, workload.momentum, workload.nesterov)
        model = {"w": np.zeros(1)}
        seen = []
        for t in range(n):
            optimizer.learning_rate = rates[t]
            model = optimizer.step(model, {"w": np.array([float(t == place)])})
            seen.append(model["w"][0])
        np.testing.assert_allclose(workload.matrix(n)[:, place], seen, atol=1e-12)
    np.testing.assert_allclose(workload.column(n), workload.matrix(n)[:, 0])


@pytest.mark.parametrize("workload", SERVERS, ids=str)
def test_errors_are_those_of_the_matrix_times_the_noise(workload):
    n = 16
    for mechanism in mechanisms(n):
        noise = np.diff(mechanism.decoder_matrix(), axis=0, prepend=0.0)
        dense = ((workload.matrix(n) @ noise) ** 2).sum(1)
        found = mechanism.row_errors(workload)
        np.testing.assert_allclose(found, dense, rtol=1e-9, err_msg=str(mechanism))
        sensitivity = mechanism.sensitivity(4, 3).value
        assert mechanism.max_loss(4, 3, workload) == pytest.approx(
            sensitivity * np.sqrt(dense.max())
        )
        assert mechanism.rms_loss(4, 3, workload) == pytest.approx(
            sensitivity * np.sqrt(dense.mean())
        )


def test_streamed_noise_has_these_errors():
    """Of draws by the stream's recurrence, through the server's SGD."""
    n, size = 12, 40_000
    tree = TreeAggregation(n, restart_every=8)
    recurrence, state = tree.recurrence(), np.zeros((4, size))
    generator = np.random.default_rng(3)
    noise = np.array(
        [
            recurrence.advance(
                t, generator.standard_normal((recurrence.draws(t), size)), state
            ).copy()
            for t in range(n)
        ]
    )
    found = COOLDOWN.models(noise).var(axis=1)
    np.testing.assert_allclose(found, tree.row_errors(COOLDOWN), rtol=0.05)


def test_plain_averaging_is_as_before_bit_for_bit():
    """However its constant learning rate is written."""
    plain = best_mechanism(64, 16, 4, memory=70)
    rates = (0.3, Linear(0.3, 64, final=0.3), [0.3] * 64, np.full(64, 0.3))
    for workload in (Workload(learning_rates=x) for x in rates):
        assert workload.is_prefix_sum(64)
        found = best_mechanism(64, 16, 4, memory=70, workload=workload)
        assert found.factorization.fingerprint() == plain.factorization.fingerprint()
        assert found.compared == plain.compared
    sums = np.random.default_rng(0).normal(size=(9, 3))
    np.testing.assert_array_equal(PREFIX_SUMS.models(sums), np.cumsum(sums, axis=0))
    assert BandedToeplitz.optimize(64, 5).fingerprint() == (
        BandedToeplitz.optimize(64, 5, workload=Workload(0.0)).fingerprint()
    )


@pytest.mark.parametrize("objective", ["rms", "max"])
@pytest.mark.parametrize(("b", "k"), [(64, 1), (16, 4), (1, 64)])
@pytest.mark.parametrize("workload", [HEAVY_BALL, Workload(0.6, nesterov=True)])
def test_what_is_tuned_for_a_server_is_never_worse_there(b, k, objective, workload):
    def loss(mechanism):
        error = mechanism.rms_loss if objective == "rms" else mechanism.max_loss
        return error(b, k, workload)

    options = {"objective": objective}
    tuned = {"workload": workload, **options}
    pairs = [
        (
            BISR.optimize(64, 4, b, k, **options),
            BISR.optimize(64, 4, b, k, **tuned),
        ),
        *(
            (
                BufferedToeplitz.optimize(64, b, k, buffers=d, **options),
                BufferedToeplitz.optimize(64, b, k, buffers=d, **tuned),
            )
            for d in (1, 2)
        ),
    ]
    if b > 1:
        pairs += [
            (
                BandedToeplitz.optimize(64, 8, **options),
                BandedToeplitz.optimize(64, 8, **tuned),
            )
        ]
    for before, after in pairs:
        assert loss(after) <= loss(before) * (1 + 1e-9)
    # The default momentum is worth it.
    if k == 4 and workload is HEAVY_BALL:
        assert loss(pairs[1][1]) < 0.95 * loss(pairs[1][0])


@pytest.mark.parametrize("workload", [HEAVY_BALL, COOLDOWN], ids=str)
def test_no_tuned_mechanism_beats_the_dense_optimum(workload):
    """A convex problem, solved by other means, over all with orthogonal columns."""
    n, b, k = 16, 4, 4
    dense = DenseFactorization.optimize(n, b, k, workload=workload)
    least = dense.rms_loss(b, k, workload)
    bands = BandedToeplitz.optimize(n, b, normalize_columns=True, workload=workload)
    assert least <= bands.rms_loss(b, k, workload) < 1.1 * least
    assert least < 0.99 * DenseFactorization.optimize(n, b, k).rms_loss(b, k, workload)
    # No direction that keeps the bands and the diagonal of C^T C leads down.
    gram = dense.strategy_matrix().T @ dense.strategy_matrix()
    query = workload.matrix(n)
    slope = np.linalg.solve(gram, np.linalg.solve(gram, query.T @ query).T)
    lag = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    free = (lag > 0) & (lag < b)
    assert np.abs(slope[free]).max() < 1e-4 * np.abs(slope).max()


@pytest.mark.parametrize("objective", ["rms", "max"])
@pytest.mark.parametrize("momentum", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("nesterov", [False, True])
def test_the_closed_form_of_a_blt_is_its_loss(momentum, nesterov, objective):
    workload = Workload(min(momentum, 0.999), nesterov)
    logits = np.array([3.0, 1.0, 0.5, 1.5])
    theta, theta_hat = (np.exp(x) for x in _interlace(logits.astype(complex)))
    omega = np.prod(theta[:, None] - theta_hat, axis=1) / np.prod(
        theta[:, None] - theta + np.eye(2), axis=1
    )
    blt = BufferedToeplitz(50, theta.real, omega.real)
    closed = _log_loss(
        logits[None].astype(complex),
        50,
        10,
        3,
        objective,
        Workload(momentum, nesterov),
    )
    loss = blt.rms_loss if objective == "rms" else blt.max_loss
    assert np.exp(closed.real / 2) == pytest.approx(loss(10, 3, workload), rel=1e-9)


@pytest.mark.parametrize("workload", SERVERS, ids=str)
def test_the_slope_of_the_error_of_bands_is_that_of_differences(workload):
    impulse, measure = _measure(16, "rms", workload)
    filtered = np.convolve(impulse, np.random.default_rng(0).normal(size=16))[:16]
    error, half = measure(filtered)
    for place in (0, 5, 15):
        moved = filtered.copy()
        moved[place] += 1e-6
        slope = (measure(moved)[0] - error) / 1e-6
        assert slope == pytest.approx(2 * half[place], rel=1e-3, abs=1e-4)


def test_some_columns_stand_for_all_of_them():
    """Bands for a cooldown over more rounds than columns are looked at."""
    workload = Workload(0.9, learning_rates=Cosine(1.0, rounds=600))
    tuned = BandedToeplitz.optimize(600, 8, workload=workload)
    steady = BandedToeplitz.optimize(600, 8, workload=workload.steady())
    found = tuned.rms_loss(600, 1, workload)
    assert found < steady.rms_loss(600, 1, workload)
    assert found < BandedToeplitz.optimize(600, 8).rms_loss(600, 1, workload)
    for place in range(1, 8):
        for step in (-1e-2, 1e-2):
            other = tuned.coefficients.copy()
            other[place] += step
            other = BandedToeplitz(600, other)
            assert other.rms_loss(600, 1, workload) >= found * (1 - 1e-6)


@pytest.mark.parametrize("workload", [HEAVY_BALL, COOLDOWN], ids=str)
def test_the_best_for_a_server_is_compared_on_what_it_does(workload):
    choice = best_mechanism(16, 4, 4, memory=16, workload=workload)
    first = choice.compared[0]
    assert choice.factorization.rms_loss(4, 4, workload) <= first.rms_loss * 1.001
    assert first.rms_loss < 0.99 * best_mechanism(
        16, 4, 4, memory=16
    ).factorization.rms_loss(4, 4, workload)
    assert best_mechanism(16, 4, 4, objective="max", workload=workload).reason


def test_a_workload_changes_the_error_and_never_the_privacy():
    sampler = MinSeparationSampler(16)
    plan = {**PLAN, "noise_multiplier": 1.0}
    del plan["min_separation"]
    plain, other = (Mechanism(**plan, workload=w) for w in (PREFIX_SUMS, HEAVY_BALL))
    for mechanism in (plain, other):
        chosen = mechanism.choose(sampler)
        accountant = mechanism.account(chosen, sampler)
        # All of it is asked of the matrix that is released, C.
        assert accountant.noise_std == chosen.sensitivity(16, 4).value
        assert accountant.epsilon_after(64, 1e-3) == plain.account(
            plain.choose(sampler), sampler
        ).epsilon_after(64, 1e-3)
        gram = chosen.strategy_matrix().T @ chosen.strategy_matrix()
        worst = gram[::16, ::16].sum()
        assert chosen.sensitivity(16, 4).value == pytest.approx(np.sqrt(worst))
    assert plain.choose(sampler).fingerprint() != other.choose(sampler).fingerprint()
    same = SquareRootToeplitz(64)
    fixed = Mechanism(**plan, factorization=same, workload=HEAVY_BALL)
    assert fixed.choose(sampler) is same


def test_dp_ftrl_says_what_its_server_does():
    plan = {**PLAN, "noise_multiplier": 1.0}
    assert DPFTRL(**plan).mechanism.workload == HEAVY_BALL
    for optimizer, workload in (
        (SGD(0.5), PREFIX_SUMS),
        (SGD(0.5, 0.8, nesterov=True), Workload(0.8, nesterov=True)),
    ):
        strategy = DPFTRL(**plan, server_optimizer=optimizer)
        assert strategy.mechanism.workload == workload
    own = Workload(0.9, learning_rates=Linear(1.0, rounds=64))
    strategy = DPFTRL(**plan, workload=own)
    assert strategy.mechanism.workload == own.over(64)
    assert len(strategy.mechanism.workload.learning_rates) == 64


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Workload(momentum=1.1), "momentum=1.1 must be between 0 and 1"),
        (lambda: Workload(nesterov=1), "nesterov=1 must be True or False"),
        (lambda: Workload(learning_rates=0.0), "learning_rates=0.0 must be"),
        (lambda: Workload(learning_rates=[1.0, 1.0]).rates(3), "must be rounds=3"),
        (lambda: Workload(learning_rates=[1.0, -1.0]).over(2), "learning_rates=-1.0"),
        (lambda: Workload(learning_rates=[0.0, 0.0]).over(2), "not all of them 0"),
        (lambda: Workload(learning_rates=[1.0, np.nan]).over(2), "learning_rates=nan"),
        (
            lambda: BISR.optimize(16, 3, workload=COOLDOWN),
            "workload=.* constant learning rate: BISR is tuned",
        ),
        (
            lambda: BufferedToeplitz.optimize(16, workload=COOLDOWN),
            "workload=.* constant learning rate: a BLT is tuned",
        ),
        (
            lambda: BandedToeplitz.optimize(16, 3, objective="max", workload=COOLDOWN),
            "objective='max' must be 'rms'",
        ),
        (
            lambda: Mechanism(
                num_rounds=4,
                num_sampled_clients=1,
                population_size=4,
                noise_multiplier=1.0,
                workload=0.9,
            ),
            r"workload=0.9 must be a Workload\(",
        ),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()
