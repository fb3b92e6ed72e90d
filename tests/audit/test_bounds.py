"""Lower bounds on epsilon: exact where they can be, honest over many audits."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from flower_ext.audit.bounds import (
    Counts,
    epsilon_at_thresholds,
    epsilon_one_run,
    one_run_guesses,
    refuted_noise,
    shift_ratio,
    split_counts,
)
from flower_ext.audit.canaries import (
    Canaries,
    learned_whitening,
    matched_scores,
    sampled_scores,
    whitening,
)
from flower_ext.privacy import (
    BandedToeplitz,
    BufferedToeplitz,
    DenseFactorization,
    Identity,
    SquareRootToeplitz,
    TreeAggregation,
    gaussian_delta,
    gaussian_epsilon,
)

DELTA = 1e-5


def gaussian_scores(mu, seen, unseen, generator):
    return generator.normal(mu, 1, seen), generator.normal(0, 1, unseen)


@pytest.mark.parametrize("counts", [(7, 3, 2, 18), (0, 5, 5, 0), (10, 0, 0, 10)])
def test_rates_are_clopper_pearson(counts):
    least, greatest = Counts(*counts).rates(0.9)
    right, missed, wrong, kept = counts
    # Each side gets half of the 10%: the ends of a two-sided 90% interval.
    seen = stats.binomtest(right, right + missed).proportion_ci(0.9, "exact")
    unseen = stats.binomtest(wrong, wrong + kept).proportion_ci(0.9, "exact")
    assert least == pytest.approx(seen.low)
    assert greatest == pytest.approx(unseen.high)


def test_a_perfect_attack_shows_the_logarithm_of_its_size():
    # With no errors in N trials the rate is below -log(0.025) / N = 3.69 / N.
    for count in (100, 1000, 10_000):
        perfect = Counts(count, 0, 0, count)
        expected = math.log(count / -math.log(0.025))
        assert perfect.epsilon(0.0) == pytest.approx(expected, abs=0.1)
        assert perfect.epsilon(0.0, method="bayesian") > perfect.epsilon(0.0)


def test_a_blind_attack_shows_nothing():
    for counts in (Counts(50, 50, 50, 50), Counts(0, 9, 0, 9), Counts(9, 0, 9, 0)):
        assert counts.epsilon(DELTA) == 0
        assert counts.epsilon(DELTA, method="bayesian") == 0
        assert counts.mu() == 0
    generator = np.random.default_rng(0)
    same = generator.normal(size=500)
    assert shift_ratio(np.tile(same, 2), np.repeat([1.0, 0.0], 500)) < 0.02
    assert split_counts(same, same, Counts.mu).mu() < 0.2


def test_swapping_the_answers_shows_as_much():
    assert Counts(90, 10, 5, 95).epsilon(0.0) == pytest.approx(
        Counts(95, 5, 10, 90).epsilon(0.0)
    )


def test_posterior_lies_between_the_bound_and_the_plain_rates():
    counts = Counts(160, 40, 20, 180)
    plain = math.log(0.8 / 0.1)
    assert counts.epsilon(0.0) < counts.epsilon(0.0, method="bayesian") < plain


def test_posterior_is_that_of_samples():
    counts = Counts(160, 40, 20, 180)
    bound = counts.epsilon(DELTA, 0.9, method="bayesian")
    generator = np.random.default_rng(0)
    right = generator.beta(160.5, 40.5, 200_000)
    wrong = generator.beta(20.5, 180.5, 200_000)
    shown = np.maximum(
        np.log((right - DELTA) / wrong), np.log((1 - wrong - DELTA) / (1 - right))
    )
    # 200,000 samples: the share is known to 0.0007, five times that is allowed.
    assert np.mean(shown <= bound) == pytest.approx(0.1, abs=0.0035)


def test_one_run_by_hand():
    # Without delta: 200 right of 200 has probability q^200 = 0.05.
    right = 0.05 ** (1 / 200)
    expected = math.log(right / (1 - right))
    assert epsilon_one_run(200, 200, 500, 0.0) == pytest.approx(expected, rel=1e-6)
    assert epsilon_one_run(100, 200, 500, 0.0) == 0
    # The delta term: p = P(B >= 3) + 2 m delta max(P(B=2)/1, P(1<=B<=2)/2, ...).
    found = epsilon_one_run(3, 4, 10, 0.001, confidence=0.3)
    q = 1 / (1 + math.exp(-found))
    binomial = stats.binom(4, q)
    terms = [binomial.pmf(range(3 - i, 3)).sum() / i for i in (1, 2, 3)]
    assert binomial.sf(2) + 2 * 10 * 0.001 * max(terms) == pytest.approx(0.7, rel=1e-6)
    assert epsilon_one_run(190, 200, 1000, 1e-3) < epsilon_one_run(190, 200, 200, 1e-3)


def test_another_library_agrees():
    """Values of jax_privacy 2.0.0, computed in an environment of its own."""
    counts = Counts(198, 102, 50, 250)
    assert counts.epsilon(1e-5) == pytest.approx(1.0376460800173017, rel=1e-9)
    for canaries, guesses, correct, epsilon, delta, expected in (
        (600, 600, 450, 1.0, 1e-5, 0.15895049620487012),
        (600, 100, 95, 2.0, 1e-3, 0.119470772146833),
        (1000, 1000, 800, 1.2, 1e-4, 0.013037990624030958),
    ):
        at = (correct, guesses, canaries)
        bound = epsilon_one_run(*at, delta, confidence=1 - expected)
        assert bound == pytest.approx(epsilon, rel=1e-5)


def test_guesses_are_made_from_both_ends():
    scores = np.array([5.0, -3, 0, 2, -7, 0.5])
    included = np.array([True, False, False, False, False, True])
    assert one_run_guesses(scores, included, 2) == 2
    assert one_run_guesses(scores, included, 4) == 3
    assert one_run_guesses(scores, included, 6) == 5


def test_shift_is_the_noncentral_t_bound():
    generator = np.random.default_rng(1)
    strengths = np.concatenate([np.full(20, 1.0), np.zeros(25)])
    scores = 0.8 * strengths + generator.normal(size=45)
    bound = shift_ratio(scores, strengths, 0.9)
    signal = scores[:20].mean()
    noise = math.sqrt(np.sum((scores - signal * strengths) ** 2) / 44)
    statistic = signal * math.sqrt(20) / noise
    exceeds = stats.nct.sf(statistic, 44, bound * math.sqrt(20))
    assert exceeds == pytest.approx(0.1, abs=1e-4)
    assert shift_ratio(7 * scores, strengths, 0.9) == pytest.approx(bound)
    assert shift_ratio(strengths, strengths) == math.inf
    assert shift_ratio(-scores, strengths) == 0


@pytest.mark.parametrize("mu", [0.5, 2.0])
def test_bounds_hold_as_often_as_they_say(mu):
    """Over 200 audits of a Gaussian mechanism, at confidence 0.9.

    Failures of a bound that fails with probability 0.1 exceed 38 with probability
    below 1e-4 (binomial); of the exact one they are below 5 with probability 2e-5.
    """
    audits, generator = 200, np.random.default_rng(3)
    epsilon = gaussian_epsilon(mu, DELTA)
    strengths = np.repeat([1.0, 0.0], 200)
    failures, shifts = {"shift": 0, "mu": 0, "counts": 0, "grid": 0, "one-run": 0}, []
    for number in range(audits):
        seen, unseen = gaussian_scores(mu, 200, 200, generator)
        scores = np.concatenate([seen, unseen])
        shifts.append(shift_ratio(scores, strengths, 0.9))
        failures["shift"] += shifts[-1] > mu
        counts = split_counts(seen, unseen, lambda c: c.mu(0.9), seed=number)
        failures["mu"] += counts.mu(0.9) > mu
        failures["counts"] += counts.epsilon(DELTA, 0.9) > epsilon
        grid = epsilon_at_thresholds(seen, unseen, [0, 1, 2], DELTA, 0.9)
        failures["grid"] += grid > epsilon
        correct = one_run_guesses(scores, strengths > 0, 400)
        one_run = epsilon_one_run(correct, 400, 400, DELTA, 0.9)
        failures["one-run"] += one_run > epsilon
    assert max(failures.values()) <= 38
    assert failures["shift"] >= 5
    assert np.median(shifts) > mu - 0.2  # tight: standard error 0.1


def test_refuted_noise_is_mu_for_a_gaussian_family():
    counts = Counts(150, 50, 30, 170)

    def profile(noise, epsilons):
        return np.array([gaussian_delta(1 / noise, float(e)) for e in epsilons])

    noise = refuted_noise(counts, profile, 1.0)
    assert 1 / noise == pytest.approx(counts.mu(), rel=0.03)
    assert 1 / noise <= counts.mu() * (1 + 1e-9)
    assert refuted_noise(Counts(50, 50, 50, 50), profile, 1.0) == math.inf


def test_canaries_are_orthonormal_and_projected_at_once():
    shapes = {"w": (7, 5), "b": (), "v": (9,)}
    canaries = Canaries(shapes, 12, seed=1)
    directions = [canaries.direction(i) for i in range(12)]
    flat = np.array(
        [np.concatenate([x.ravel() for x in d.values()]) for d in directions]
    )
    np.testing.assert_allclose(flat @ flat.T, np.eye(12), atol=1e-12)
    generator = np.random.default_rng(0)
    vector = {name: generator.normal(size=shape) for name, shape in shapes.items()}
    whole = np.concatenate([x.ravel() for x in vector.values()])
    np.testing.assert_allclose(canaries.project(vector), flat @ whole)
    with pytest.raises(ValueError, match="count=46 must be <= 45 parameters"):
        Canaries(shapes, 46, seed=1)


def patterns(rounds, separation, most):
    for size in range(1, most + 1):
        for rows in itertools.combinations(range(rounds), size):
            if all(b - a >= separation for a, b in itertools.pairwise(rows)):
                yield rows


@pytest.mark.parametrize("separation", [1, 3])
def test_matched_filter_reaches_the_sensitivity(separation):
    """The worst pattern's strength is mu of the accountant, for every mechanism.

    All but streamed trees: their sensitivity counts nodes that are never read.
    """
    n, most = 7, 2
    columns = list(patterns(n, separation, most))
    part = np.zeros((n, len(columns)), bool)
    for index, rows in enumerate(columns):
        part[list(rows), index] = True
    for mechanism in (
        Identity(n),
        SquareRootToeplitz(n),
        BandedToeplitz.optimize(n, 3),
        BandedToeplitz.optimize(n, 3, normalize_columns=True),
        BufferedToeplitz(n, np.array([0.9, 0.4]), np.array([0.2, 0.3])),
        DenseFactorization.optimize(n, 3, most),
        TreeAggregation(n, estimator="full"),
        TreeAggregation(n),
        TreeAggregation(n, estimator="online"),
        TreeAggregation(n, restart_every=3),
    ):
        _, strengths = matched_scores(
            whitening(mechanism, 2.0), np.zeros(part.shape), part
        )
        found = mechanism.sensitivity(separation, most)
        streamed = "tree" in mechanism.name and "full" not in mechanism.name
        if streamed or not found.exact:
            assert strengths.max() <= found.value / 2 * (1 + 1e-9)
        else:
            assert strengths.max() == pytest.approx(found.value / 2), mechanism


def test_scores_are_standard_normal_around_their_strength():
    n, count = 6, 4000
    generator = np.random.default_rng(5)
    part = generator.random((n, count)) < 0.5
    for mechanism in (SquareRootToeplitz(n), TreeAggregation(n)):
        root = np.linalg.cholesky(covariance(mechanism))
        noisy = part + 0.7 * root @ generator.normal(size=(n, count))
        scores, strengths = matched_scores(whitening(mechanism, 0.7), noisy, part)
        rest = (scores - strengths)[part.any(axis=0)]
        # Standard errors 0.016 and 0.011; five of them are allowed.
        assert abs(rest.mean()) < 0.08
        assert rest.std() == pytest.approx(1, abs=0.056)


def test_learned_whitening_is_that_of_the_samples():
    noise = np.random.default_rng(0).normal(size=(4, 4)) @ np.eye(4, 200, 3)
    noise += np.random.default_rng(1).normal(size=(4, 200))
    whiten = learned_whitening(noise)
    white = whiten @ noise
    np.testing.assert_allclose(white @ white.T / 200, np.eye(4), atol=1e-6)
    repeated = learned_whitening(np.vstack([noise[0], noise[0]]))
    assert np.linalg.norm(repeated @ [1, 0]) > 1000  # one round gives the other away


def covariance(mechanism):
    steps = np.diff(mechanism.decoder_matrix(), axis=0, prepend=0.0)
    return steps @ steps.T


def test_sampled_score_is_the_log_likelihood_ratio():
    generator = np.random.default_rng(2)
    values, chance = generator.normal(size=(3, 5)), np.full((3, 5), 0.3)
    white = whitening(Identity(3), 0.5)
    found = sampled_scores(white, values, chance)
    normal = stats.norm(0, 0.5)
    mixture = 0.7 * normal.pdf(values) + 0.3 * normal.pdf(values - 1)
    np.testing.assert_allclose(found, np.log(mixture / normal.pdf(values)).sum(0))
    opposite = 0.7 * normal.pdf(values) + 0.3 * normal.pdf(values + 1)
    both = sampled_scores(white, values, chance, replaced=True)
    np.testing.assert_allclose(both, np.log(mixture / opposite).sum(0))
    always = sampled_scores(white, values, np.ones((3, 5)))
    scores, mu = matched_scores(white, values, np.ones((3, 5), bool))
    np.testing.assert_allclose(always, mu * scores - mu**2 / 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Counts(0, 0, 1, 1), "at least one seen"),
        (lambda: Counts(1, 1, 0, 0), "at least one unseen"),
        (lambda: Counts(-1, 1, 1, 1), "true_positives=-1"),
        (lambda: Counts(1, 1, 1, 1).epsilon(0.1, method="wald"), "method='wald'"),
        (lambda: Counts(1, 1, 1, 1).epsilon(-0.1), "delta=-0.1"),
        (lambda: Counts(1, 1, 1, 1).mu(1.0), "confidence=1.0"),
        (lambda: epsilon_one_run(3, 2, 4, 0.0), "correct=3 must be <= guesses=2"),
        (lambda: one_run_guesses(np.zeros(3), np.ones(3, bool), 4), "guesses=4"),
        (lambda: split_counts(np.zeros(1), np.zeros(2), Counts.mu), "at least 2"),
        (lambda: epsilon_at_thresholds(np.zeros(1), np.zeros(1), [], 0.0), "at least"),
        (lambda: shift_ratio(np.zeros(9), np.zeros(9)), "at least one seen"),
        (
            lambda: matched_scores(np.eye(2), np.zeros((2, 3)), np.zeros((2, 2), bool)),
            "took_part.shape",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
