"""The audit: silent on correct mechanisms, loud on wrong ones, for every mechanism.

All noise and coins are seeded, so that no test is flaky. With other seeds, a correct
mechanism would be called violated with probability 1e-3 (1 - the confidence), and a
wrong one would be missed with probability below 1e-3 unless said otherwise.
"""

import inspect

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from flower_ext import AdditiveStrategy
from flower_ext.audit.run import audit
from flower_ext.core.sampling import (
    BallsInBinsSampler,
    CyclicPoissonSampler,
    Guarantee,
    MinSeparationSampler,
    PoissonSampler,
    UniformSampler,
)
from flower_ext.privacy import (
    AdaptiveClipping,
    BandedToeplitz,
    BufferedToeplitz,
    DenseFactorization,
    FlatClipping,
    GaussianAccountant,
    Mechanism,
    NoiseStream,
    PerLayerClipping,
    SquareRootToeplitz,
    TreeAggregation,
    gaussian_epsilon,
)
from flower_ext.server.optimizers import SGD
from flower_ext.strategies import FLASC, BoundedGroupLoss, FedFish, MaxFL

ROUNDS, CLIENTS, COHORT, SEPARATION = 8, 240, 60, 4
FACTORIZATIONS = {
    "identity": lambda: "identity",
    "tree-honaker": lambda: "tree",
    "tree-online": lambda: TreeAggregation(ROUNDS, estimator="online"),
    "tree-restart": lambda: TreeAggregation(ROUNDS, restart_every=3),
    "root": lambda: SquareRootToeplitz(ROUNDS),
    "banded": lambda: BandedToeplitz.optimize(ROUNDS, 4),
    "normalised": lambda: BandedToeplitz.optimize(ROUNDS, 4, normalize_columns=True),
    "blt": lambda: BufferedToeplitz(
        ROUNDS, np.array([0.95, 0.6]), np.array([0.2, 0.3])
    ),
    "dense": lambda: DenseFactorization.optimize(ROUNDS, SEPARATION, 2),
}


def private(factorization="identity", kind=AdditiveStrategy, sampler=None, **options):
    """Return a factory of strategies, their noise seeded by the number of the run."""
    planned = {
        "num_rounds": ROUNDS,
        "num_sampled_clients": COHORT,
        "population_size": CLIENTS,
        "noise_multiplier": 1.0,
        "target_delta": 1e-5,
        "factorization": factorization,
    }
    known = inspect.signature(Mechanism).parameters
    planned |= {key: value for key, value in options.items() if key in known}
    own = {key: value for key, value in options.items() if key not in known}

    def factory(run):
        drawn = sampler() if sampler else MinSeparationSampler(SEPARATION)
        return kind(mechanism=Mechanism(**planned, seed=run), sampler=drawn, **own)

    return factory


def run(factory, **options):
    return audit(factory, **{"confidence": 0.999, **options})


@pytest.mark.parametrize("kind", FACTORIZATIONS)
def test_a_correct_mechanism_is_consistent_and_nearly_all_of_it_is_shown(kind):
    report = run(private(FACTORIZATIONS[kind]()))
    # 240 canaries: mu is known to a tenth, and bounded three tenths below.
    assert not report.violated, report
    assert report.epsilon_claimed == pytest.approx(4.37718, abs=1e-5)
    assert report.epsilon_lower_bound > 0.45 * report.epsilon_claimed, report
    assert report.most_participations == 2


@pytest.mark.parametrize("kind", FACTORIZATIONS)
def test_halved_noise_shows(kind, monkeypatch):
    draw = NoiseStream._draw
    monkeypatch.setattr(NoiseStream, "_draw", lambda self, scale: draw(self, scale / 2))
    assert run(private(FACTORIZATIONS[kind]())).violated


@pytest.mark.parametrize("kind", ["identity", "blt"])
@pytest.mark.parametrize("clipping", [FlatClipping, PerLayerClipping])
def test_a_forgotten_clip_shows(kind, clipping, monkeypatch):
    monkeypatch.setattr(
        clipping, "factors", lambda self, norms, bound: dict.fromkeys(norms, 1.0)
    )
    report = run(private(FACTORIZATIONS[kind](), clipping=clipping(0.3)))
    assert report.violated
    assert report.epsilon_lower_bound > 100


def test_a_forgotten_sensitivity_shows(monkeypatch):
    monkeypatch.setattr(
        GaussianAccountant, "noise_std", property(lambda self: self.noise_multiplier)
    )
    assert run(private(FACTORIZATIONS["root"]())).violated


def test_a_round_without_noise_shows(monkeypatch):
    draw = NoiseStream._draw

    def forgetful(self, scale):
        return draw(self, scale * (self._round != 3))

    monkeypatch.setattr(NoiseStream, "_draw", forgetful)
    assert run(private()).violated


@pytest.mark.parametrize("kind", ["identity", "blt"])
def test_repeated_noise_shows(kind, monkeypatch):
    source = NoiseStream._source
    monkeypatch.setattr(
        NoiseStream, "_source", lambda self, step, i: source(self, step % 3, i)
    )
    assert run(private(FACTORIZATIONS[kind]())).violated


class TooOften(UniformSampler):
    """Promises two participations, and draws whom it likes."""

    def guarantee(self):
        return Guarantee(
            kind="limited", min_separation=SEPARATION, max_participations=2
        )


class TooSoon(MinSeparationSampler):
    """Draws everybody in two rounds that follow each other, and never again."""

    def sample(self, clients, size, server_round, purpose):
        return list(clients) if server_round in (3, 4) else []

    def guarantee(self):
        return super().guarantee()

    def expected_size(self, size, population):
        return size


@pytest.mark.parametrize("kind", ["identity", "blt", "tree-honaker"])
def test_a_client_that_takes_part_too_often_shows(kind):
    report = run(private(FACTORIZATIONS[kind](), sampler=TooOften))
    assert report.violated
    assert report.most_participations > 2


def test_a_client_that_returns_too_soon_shows():
    # Columns of C that follow each other overlap: sensitivity is 1.3 times the claim.
    blt = BufferedToeplitz(ROUNDS, np.array([0.5]), np.array([0.9]))
    options = {"num_sampled_clients": 900, "population_size": 900}
    broken = private(blt, sampler=lambda: TooSoon(SEPARATION), **options)
    report = run(broken)
    assert report.violated
    assert report.most_participations == 2


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (FedFish, {"scales": {"fisher": 5.0}}),
        (MaxFL, {}),
        (FLASC, {}),
        (
            BoundedGroupLoss,
            {"groups": ["a", "b"], "upper_bound": 0.5, "group_counts": [9, 9]},
        ),
    ],
)
def test_every_strategy_has_the_same_guarantee(kind, options, monkeypatch):
    factory = private(kind=kind, **options)
    report = run(factory)
    assert not report.violated
    assert report.epsilon_lower_bound > 0.4 * report.epsilon_claimed
    draw = NoiseStream._draw
    monkeypatch.setattr(NoiseStream, "_draw", lambda self, scale: draw(self, scale / 2))
    assert run(factory).violated


@pytest.mark.parametrize(
    "clipping", [PerLayerClipping(0.1), AdaptiveClipping(0.1), FlatClipping(50.0)]
)
def test_clipping_of_every_kind(clipping):
    model = ArrayRecord({k: Array(np.zeros(s)) for k, s in (("a", 700), ("b", 300))})
    report = run(private(clipping=clipping), arrays=model)
    assert not report.violated
    assert report.epsilon_lower_bound > 0.4 * report.epsilon_claimed


def test_momentum_changes_nothing():
    blt = FACTORIZATIONS["blt"]()
    moved = private(blt, server_optimizer=SGD(0.1, momentum=0.9))
    assert run(moved).epsilon_lower_bound == run(private(blt)).epsilon_lower_bound


def sampled(kind, **options):
    if kind == "poisson":
        return private(
            sampler=lambda: PoissonSampler(2**120 + 5, probability=0.25),
            amplified=True,
            **options,
        )
    return private(
        BandedToeplitz.optimize(options.get("num_rounds", ROUNDS), 4),
        sampler=lambda: CyclicPoissonSampler(0.8, 4, seed=2**120 + 11),
        amplified=True,
        num_sampled_clients=48,
        **options,
    )


@pytest.mark.parametrize("kind", ["poisson", "cyclic"])
def test_amplified_by_sampling(kind, monkeypatch):
    options = {"noise_multiplier": 0.5, "num_rounds": 4}
    report = run(sampled(kind, **options), clients=1000)
    assert not report.violated
    assert 0 < report.epsilon_lower_bound < report.epsilon_claimed
    draw = NoiseStream._draw
    monkeypatch.setattr(NoiseStream, "_draw", lambda self, scale: draw(self, scale / 2))
    assert run(sampled(kind, **options), clients=1000).violated


def test_balls_in_bins(monkeypatch):
    factory = private(
        BandedToeplitz.optimize(4, 4),
        sampler=lambda: BallsInBinsSampler(4, seed=2**120 + 11),
        amplified=True,
        noise_multiplier=1.0,
        num_rounds=4,
        target_delta=1e-2,
    )
    report = run(factory, clients=4000)
    assert report.method == "counts"
    assert not report.violated
    assert 0.15 * report.epsilon_claimed < report.epsilon_lower_bound
    draw = NoiseStream._draw
    monkeypatch.setattr(NoiseStream, "_draw", lambda self, scale: draw(self, scale / 2))
    assert run(factory, clients=4000).violated


def fixed_cohorts():
    return private(sampler=lambda: UniformSampler(2**120), amplified=True, num_rounds=2)


def test_fixed_cohorts():
    report = run(fixed_cohorts(), confidence=0.95)
    assert report.method == "counts"
    assert not report.violated


@pytest.mark.parametrize("method", ["trade-off", "counts", "one-run"])
def test_other_bounds_are_weaker(method):
    factory = private(noise_multiplier=0.4)
    report = run(factory, method=method, confidence=0.95)
    best = run(factory, confidence=0.95)
    assert 0.5 < report.epsilon_lower_bound < best.epsilon_lower_bound
    assert best.epsilon_lower_bound < best.epsilon_claimed
    assert report.method == method


def test_more_runs_say_more():
    factory = private(noise_multiplier=4.0)
    one, four = run(factory), run(factory, runs=4)
    assert four.seen + four.unseen == 4 * CLIENTS
    assert one.epsilon_claimed == four.epsilon_claimed
    assert one.epsilon_lower_bound < four.epsilon_lower_bound < four.epsilon_claimed


def test_a_run_that_its_budget_ends_is_audited_so_far():
    report = run(private(max_epsilon=4.0))
    once = gaussian_epsilon(0.5**0.5, 1e-5)  # the second round of a client is too much
    assert report.epsilon_claimed == pytest.approx(once)
    assert not report.violated


def test_the_report_reads_well():
    report = run(private())
    bound = f"epsilon >= {report.epsilon_lower_bound:.4g}"
    assert str(report).startswith(f"consistent: {bound} with confidence 0.999")
    assert report.method == "gaussian"
    assert report.seen + report.unseen == CLIENTS


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        (lambda run: AdditiveStrategy(), {}, "nothing is claimed"),
        (private(noise_multiplier=0), {}, "nothing is claimed"),
        (private(simulated_cohort=10), {}, "simulated_cohort=10"),
        (private(), {"method": "best"}, "method='best'"),
        (private(), {"runs": 0}, "runs=0"),
        (private(), {"confidence": 1.0}, "confidence=1.0"),
        (
            sampled("poisson", num_rounds=1),
            {"method": "gaussian"},
            "amplified by sampling",
        ),
        (
            private(),
            {"arrays": ArrayRecord({"w": Array(np.zeros(9))})},
            "clients=240 must be <= 9 parameters",
        ),
    ],
)
def test_refusals(factory, options, message):
    with pytest.raises(ValueError, match=message):
        audit(factory, **options)
