"""Balls in bins: the bound against quadrature, lattices and attacks; who is refused."""

import math
import warnings
from itertools import product

import numpy as np
import pytest
from flwr import serverapp
from scipy.special import ndtr

from flower_ext import AdditiveStrategy
from flower_ext.core.sampling import (
    BallsInBinsSampler,
    Guarantee,
    MinSeparationSampler,
    PoissonSampler,
    Sampler,
)
from flower_ext.privacy import (
    BallsInBinsAccountant,
    BandedToeplitz,
    BufferedToeplitz,
    DenseFactorization,
    Identity,
    Mechanism,
    PrivateEvaluation,
    PrivateSum,
    SquareRootToeplitz,
    Toeplitz,
    TreeAggregation,
    epsilon_for,
    gaussian_delta,
    gaussian_epsilon,
    noise_multiplier_in_bins,
)
from flower_ext.privacy.accounting import balls_in_bins, mixtures
from flower_ext.privacy.accounting.accountants import Evaluations
from flower_ext.privacy.accounting.balls_in_bins import bin_shifts
from flower_ext.privacy.accounting.mixtures import GaussianMixtureLoss

DELTA = 1e-5


@pytest.fixture
def few_draws(monkeypatch):
    """An eighth of the draws: bounds are looser, and tests faster."""
    monkeypatch.setattr(mixtures, "_MOST_DRAWS", 2**15)
    balls_in_bins._epsilon.cache_clear()
    yield
    balls_in_bins._epsilon.cache_clear()


quick = pytest.mark.usefixtures("few_draws")


def bounds(gram, shares=None, *, failure=1e-7, **options):
    gram = np.asarray(gram, np.float64)
    even = np.full(len(gram), 1 / len(gram))
    shares = even if shares is None else np.asarray(shares)
    return GaussianMixtureLoss(gram, shares, failure=failure, **options)


def configuration(**options):
    usual = {"target_delta": DELTA, "population_size": 1000} | options
    return serverapp.PrivacyConfig(
        neighboring_relation=serverapp.NeighboringRelation.ADD_OR_REMOVE_ONE,
        sampling_method=serverapp.SamplingMethod.NO_AMPLIFICATION,
        **usual,
    )


def accountant(factorization, noise, num_bins, **options):
    return BallsInBinsAccountant(
        factorization, noise, num_bins, configuration(), **options
    )


# Exact divergences, by other means ---------------------------------------------------


def positive_part(rest, scale, spread, sign):
    """E[(sign (rest + scale e^(spread g - spread^2 / 2)))_+] over a normal g."""
    if spread == 0:
        return np.maximum(sign * (rest + scale), 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        limit = np.where(
            rest < 0, (np.log(-rest / scale) + spread**2 / 2) / spread, -np.inf
        )
    there = rest * ndtr(-limit) + scale * ndtr(spread - limit)
    return there if sign > 0 else there - rest - scale


def two_shifts(gram, shares, epsilon, second=lambda first: 1.0):
    """Both divergences of two shifts: one integral by hand, the other on a fine grid.

    ``second`` scales the second shift by what the first coordinate has shown.
    """
    (first, cross), (_, other) = gram
    g = np.linspace(-14, 14, 280_001)
    density = np.exp(-(g**2) / 2) / math.sqrt(2 * math.pi) * (g[1] - g[0])
    # The first coordinate is along the first shift, the second one completes the other.
    along = cross / math.sqrt(first) if first else 0.0
    spread = math.sqrt(max(other - along**2, 0.0))
    ratio = shares[0] * np.exp(math.sqrt(first) * g - first / 2)
    factor = shares[1] * np.exp(along * g - along**2 / 2)
    scales = np.asarray(second(g)) * spread
    e = math.exp(epsilon)
    removed, added = 0.0, 0.0
    for value in np.unique(scales):
        here = (scales == value) & (density > 0)
        weight = density[here]
        removed += weight @ positive_part(ratio[here] - e, factor[here], value, 1)
        added += weight @ (
            e * positive_part(ratio[here] - 1 / e, factor[here], value, -1)
        )
    return float(removed), float(added)


def many_shifts(count, energy, epsilon):
    """Both divergences of orthogonal shifts of one length, by convolving lattices."""
    step, size = 2.0**-13, 2**19
    edges = np.arange(size + 1) * step - step / 2
    with np.errstate(divide="ignore"):
        logs = np.log(np.maximum(edges, 0.0) * count) + energy / 2
    mass = np.diff(ndtr(logs / math.sqrt(energy)))
    others = np.fft.irfft(np.fft.rfft(mass) ** (count - 1), size)
    rest, e = np.arange(size) * step, math.exp(epsilon)
    spread = math.sqrt(energy)
    removed = others @ positive_part(rest - e, 1 / count, spread, 1)
    added = others @ (e * positive_part(rest - 1 / e, 1 / count, spread, -1))
    return float(removed), float(added)


SHIFTS = {
    "orthogonal": ([[1.0, 0.0], [0.0, 1.0]], [0.5, 0.5]),
    "correlated": ([[1.0, 0.6], [0.6, 0.8]], [0.5, 0.5]),
    "rarely there": ([[2.0, 0.0], [0.0, 0.0]], [0.1, 0.9]),
    "the same": ([[1.0, 1.0], [1.0, 1.0]], [0.3, 0.7]),
    "little noise": ([[16.0, 3.0], [3.0, 9.0]], [0.5, 0.5]),
}


@pytest.mark.parametrize("kind", SHIFTS)
@pytest.mark.parametrize("epsilon", [0.3, 1.5, 4.0])
def test_two_shifts_by_quadrature(kind, epsilon):
    gram, shares = SHIFTS[kind]
    removed, added = two_shifts(gram, shares, epsilon)
    delta = bounds(gram, shares).delta(epsilon)
    assert max(removed, added) <= delta * (1 + 1e-9)
    # Draws show the true values, and cost a few percent where these are not tiny.
    rough = bounds(gram, shares, failure=0.99)
    for direction, exact in zip(rough._directions, (removed, added), strict=True):
        if exact > 1e-12:
            found = rough._delta(direction, epsilon)
            assert found == pytest.approx(exact, rel=0.05)
    if max(removed, added) > 1e-8:
        assert delta < 1.15 * max(removed, added)


@pytest.mark.parametrize("kind", SHIFTS)
def test_epsilon_and_delta_are_inverse(kind):
    gram, shares = SHIFTS[kind]
    for delta in (1e-3, 1e-6):
        epsilon = bounds(gram, shares).epsilon(delta)
        assert max(two_shifts(gram, shares, epsilon)) <= delta * (1 + 1e-6)
        assert max(two_shifts(gram, shares, 0.95 * epsilon)) > delta


@pytest.mark.parametrize(
    ("count", "energy", "epsilon"),
    [(4, 0.2, 0.3), (4, 1.0, 1.5), (16, 0.1, 0.15), (24, 0.9, 1.4)],
)
def test_many_bins_by_lattice(count, energy, epsilon):
    exact = many_shifts(count, energy, epsilon)
    gram = energy * np.eye(count)
    found = bounds(gram).delta(epsilon)
    assert max(exact) <= found < 1.3 * max(exact)
    rough = bounds(gram, failure=0.99)
    removed = rough._delta(rough._directions[0], epsilon)
    assert removed == pytest.approx(exact[0], rel=0.08)


def test_lattice_and_quadrature_agree():
    both = two_shifts(np.eye(2), [0.5, 0.5], 1.5)
    assert many_shifts(2, 1.0, 1.5) == pytest.approx(both, rel=1e-3)


# Rounds, bins, first column of C (then normalised), noise, and the two deltas at an
# epsilon of 1 with the standard errors of a million draws each, by jax_privacy's
# experimental.monte_carlo of August 2026.
JAX_PRIVACY = [
    (100, 10, [1.0, 0.5, 0.25, 0.125], 3.0, (0.01953, 7.2e-5), (0.01526, 8.7e-5)),
    (40, 20, [1.0], 1.0, (0.0146, 6.4e-5), (0.001859, 2e-5)),
    (24, 4, [1.0, 0.5, 0.4, 0.3, 0.2, 0.1], 3.0, (0.05962, 1e-4), (0.05913, 1.5e-4)),
]


@pytest.mark.parametrize("entry", JAX_PRIVACY)
def test_deltas_of_jax_privacy(entry):
    rounds, num_bins, column, noise, *expected = entry
    plan = Toeplitz(rounds, np.array(column) / np.linalg.norm(column))
    gram, shares = bin_shifts(plan, num_bins)
    loss = bounds(gram / noise**2, shares, failure=0.99)
    for direction, (delta, error) in zip(loss._directions, expected, strict=True):
        found = loss._delta(direction, 1.0)
        assert found == pytest.approx(delta, rel=0.01, abs=4 * error)


def test_one_bin_is_everybody_in_every_round():
    bands = BandedToeplitz(6, np.array([1.0, 0.5, 0.25]))
    for plan in (Identity(6), bands):
        one = accountant(plan, 1.3, 1)
        whole = plan.sensitivity(1, 6).value
        for rounds in range(1, 7):
            part = plan.first(rounds).sensitivity(1, rounds).value
            mu = part / one.noise_std
            # A hundredth of delta pays for draws, of which there are none here.
            assert one.epsilon_after(rounds, DELTA) == gaussian_epsilon(
                mu, DELTA - (1 - one.confidence)
            )
        noise = noise_multiplier_in_bins(2.0, DELTA, factorization=plan, num_bins=1)
        column = plan.sensitivity(1, 1).value
        assert gaussian_delta(whole / (noise * column), 2.0) == pytest.approx(
            0.99 * DELTA, rel=1e-6
        )


@quick
@pytest.mark.parametrize("energy", [1e-8, 1e-2, 100.0, 1e12])
def test_any_noise_and_any_target_is_at_most_what_known_bins_cost(energy):
    loss = bounds(energy * np.eye(5))
    for delta in (1e-100, 1e-9, 0.9):
        known = gaussian_epsilon(math.sqrt(energy), delta)
        assert 0 <= loss.epsilon(delta) <= known
    for epsilon in (0.0, 0.1, 50.0, 1e6):
        known = gaussian_delta(math.sqrt(energy), epsilon)
        assert 0 <= loss.delta(epsilon) <= known


def test_bounds_are_wrong_as_rarely_as_stated(monkeypatch):
    """Few draws and a large failure probability: of 200 bounds some are wrong."""
    monkeypatch.setattr(mixtures, "_MOST_DRAWS", 400)
    monkeypatch.setattr(mixtures, "_LEAST_DRAWS", 400)
    gram, shares = SHIFTS["correlated"]
    exact = max(two_shifts(gram, shares, 1.5))
    wrong = sum(
        bounds(gram, shares, failure=0.99, stream=stream).delta(1.5) < exact
        for stream in range(200)
    )
    # At most 0.495 for each of the two divergences, of which one is far below.
    assert 0 < wrong <= 99


# The worst client ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_no_client_does_more_than_the_shifts_say(seed):
    """Any directions, for a C of any signs: two bins, compared by quadrature."""
    rng = np.random.default_rng(seed)
    rounds = 5
    plan = Toeplitz(rounds, np.array([1.0, *rng.uniform(-1, 1, 3)]))
    gram, shares = bin_shifts(plan, 2)
    assert shares.tolist() == [0.5, 0.5]
    sent = rng.standard_normal((rounds, 3))
    sent /= np.maximum(1.0, np.linalg.norm(sent, axis=1, keepdims=True))
    shifts = [
        np.where((np.arange(rounds) % 2 == i)[:, None], sent, 0.0) for i in range(2)
    ]
    moved = [plan.strategy_matrix() @ shift for shift in shifts]
    own = np.array([[np.sum(a * b) for b in moved] for a in moved])
    for epsilon in (0.5, 2.0):
        worst = two_shifts(gram / 4, shares, epsilon)
        less = two_shifts(own / 4, shares, epsilon)
        assert less[0] <= worst[0] * (1 + 1e-9) and less[1] <= worst[1] * (1 + 1e-9)


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_neither_does_one_that_adapts(threshold, sign):
    """It sends in the second round if the first release was large, or small."""
    for epsilon in (0.2, 1.0):
        worst = two_shifts(np.eye(2), [0.5, 0.5], epsilon)
        adaptive = two_shifts(
            np.eye(2),
            [0.5, 0.5],
            epsilon,
            second=lambda g: np.where(sign * (g - threshold) > 0, 1.0, 0.4),
        )
        assert adaptive[0] < worst[0]
        assert adaptive[1] <= worst[1] * (1 + 1e-12)


NODES = np.linspace(-9, 9, 37)
LIKELY = np.exp(-(NODES**2) / 2) / np.exp(-(NODES**2) / 2).sum()


def excesses(ratios, epsilon):
    """(L - e^epsilon)_+ and (1 - e^epsilon L)_+."""
    e = math.exp(epsilon)
    return np.array([np.maximum(ratios - e, 0.0), np.maximum(1 - e * ratios, 0.0)])


def grown(ratio, shift):
    """Likelihood ratios after a further release, by its outcome."""
    return ratio[..., None] * np.exp(shift * NODES - shift**2 / 2)


def best_attack(matrix, epsilon):
    """Both divergences of the best client of three rounds and two bins.

    What it sends, one of five numbers, is the best after every outcome before: found
    from the last round backwards.
    """
    sizes, best = (-1.0, -0.5, 0.0, 0.5, 1.0), np.zeros(2)
    for one in (0.0, 0.5, 1.0):  # the other signs are mirrored
        first = [grown(np.ones(()), shift) for shift in (matrix[0, 0] * one, 0.0)]
        for_second = []
        for two in sizes:
            second = (matrix[1, 0] * one, matrix[1, 1] * two)
            ratios = [grown(*x) for x in zip(first, second, strict=True)]
            for_third = []
            for three in sizes:
                third = (
                    matrix[2, 0] * one + matrix[2, 2] * three,
                    matrix[2, 1] * two,
                )
                ends = [grown(*x) for x in zip(ratios, third, strict=True)]
                for_third.append(excesses(np.mean(ends, axis=0), epsilon) @ LIKELY)
            for_second.append(np.max(for_third, axis=0) @ LIKELY)
        best = np.maximum(best, np.max(for_second, axis=0) @ LIKELY)
    return best


def as_the_shifts_say(matrix, epsilon):
    """The same grid's divergences of the shifts that are accounted for."""
    size = np.abs(matrix)
    ratios = [np.ones(()), np.ones(())]
    for row in size:
        shifts = (row[0] + row[2], row[1])
        ratios = [grown(*x) for x in zip(ratios, shifts, strict=True)]
    return excesses(np.mean(ratios, axis=0), epsilon) @ LIKELY @ LIKELY @ LIKELY


@pytest.mark.parametrize("seed", range(4))
def test_the_best_adaptive_client_is_no_worse(seed):
    """For a C of any signs; and with one without, it is as bad as that."""
    rng = np.random.default_rng(seed)
    matrix, epsilon = np.tril(rng.uniform(-1, 1, (3, 3))), rng.choice([0.2, 1.0])
    worst = as_the_shifts_say(matrix, epsilon)
    assert (best_attack(matrix, epsilon) <= worst * (1 + 1e-9)).all()
    attained = best_attack(np.abs(matrix), epsilon)
    np.testing.assert_allclose(attained, worst, rtol=1e-9)


def test_sums_of_signed_columns_would_not_be_enough():
    """With negative entries a client does better than by sending the same."""
    matrix = np.array([[1.0, 0, 0], [0, 0.1, 0], [-1.0, 0, 1.0]])
    same = np.diag([1.0, 0.1, 0.0])
    assert (best_attack(matrix, 0.2) > 1.1 * as_the_shifts_say(same, 0.2)).all()


@pytest.mark.parametrize(
    ("plan", "num_bins"),
    [
        (BandedToeplitz(7, np.array([1.0, 0.5, 0.3])), 2),
        (BandedToeplitz(7, np.array([1.0, -0.5, 0.3]), normalize_columns=True), 3),
        (BufferedToeplitz(6, np.array([0.9]), np.array([0.4])), 4),
        (SquareRootToeplitz(5), 8),
        (DenseFactorization.optimize(6, 3, 2), 3),
    ],
)
def test_shifts_are_sums_of_columns(plan, num_bins):
    matrix = np.abs(plan.strategy_matrix())
    gram, shares = bin_shifts(plan, num_bins)
    expected = np.zeros((num_bins, plan.rounds))
    for time, row in product(range(plan.rounds), repeat=2):
        expected[time % num_bins, row] += matrix[row, time]
    bins = len(gram) if num_bins > plan.rounds else num_bins
    np.testing.assert_allclose(gram, (expected @ expected.T)[:bins, :bins])
    assert shares.sum() == pytest.approx(1.0)
    if num_bins > plan.rounds:
        assert bins == plan.rounds + 1
        assert shares[-1] == pytest.approx(1 - plan.rounds / num_bins)


@quick
def test_a_bin_that_never_comes_is_as_good_as_any_number_of_them():
    gram, shares = bin_shifts(Identity(2), 4)
    apart = np.diag([1.0, 1.0, 0.0, 0.0])
    assert bounds(gram, shares).delta(0.8) == pytest.approx(
        bounds(apart).delta(0.8), rel=0.05
    )


# Accountant ---------------------------------------------------------------------------


@quick
def test_epsilon_is_counted_in_whole_passes_and_rises():
    bins = accountant(BandedToeplitz(10, np.array([1.0, 0.5])), 1.0, 4)
    spent = [bins.epsilon_after(rounds, DELTA) for rounds in range(11)]
    assert spent[0] == 0.0
    assert len(set(spent)) == 4
    assert spent[1] == spent[4] < spent[5] == spent[8] < spent[9] == spent[10]
    assert bins.delta_after(10, spent[10]) == pytest.approx(DELTA, rel=0.02)
    assert bins.delta_after(0, 1.0) == 0.0


@quick
def test_between_poisson_sampling_and_no_amplification():
    rounds, num_bins, noise = 20, 10, 1.0
    bins = accountant(Identity(rounds), noise, num_bins).epsilon_after(rounds, DELTA)
    known = gaussian_epsilon(math.sqrt(2) / noise, DELTA)
    assert bins < 0.8 * known
    # Not a theorem here, but what is known of DP-SGD: about as private as Poisson
    # sampling of the same average.
    poisson = epsilon_for(
        noise, DELTA, rounds=rounds, sampling_probability=1 / num_bins
    )
    assert 0.6 * poisson < bins < 1.6 * poisson


@quick
def test_bands_that_overlap_in_a_client_cost_what_they_must():
    noise, num_bins = 1.0, 4
    bands = [BandedToeplitz(12, np.array([1.0, *[0.5] * n])) for n in (0, 3, 7)]
    spent = [accountant(b, noise, num_bins).epsilon_after(12, DELTA) for b in bands]
    assert spent == sorted(spent)
    known = [
        gaussian_epsilon(
            b.sensitivity(4, 3).value / (noise * b.sensitivity(1, 1).value), DELTA
        )
        for b in bands
    ]
    assert all(one < other for one, other in zip(spent, known, strict=True))


@quick
@pytest.mark.parametrize("epsilon", [1.0, 4.0])
@pytest.mark.parametrize(
    "plan", [Identity(12), BandedToeplitz(12, np.array([1.0, 0.6, 0.4]))]
)
def test_a_target_is_met_and_not_exceeded(plan, epsilon):
    noise = noise_multiplier_in_bins(epsilon, DELTA, factorization=plan, num_bins=4)
    assert 0.96 * epsilon < accountant(plan, noise, 4).epsilon_after(12, DELTA)
    assert accountant(plan, noise, 4).epsilon_after(12, DELTA) <= epsilon
    assert accountant(plan, 0.97 * noise, 4).epsilon_after(12, DELTA) > epsilon


@quick
def test_the_confidence_is_stated_and_paid_for():
    bins = accountant(Identity(8), 1.0, 4, confidence=1 - 1e-6)
    assert bins.caveat == "by Monte Carlo, confidence 1 - 1e-06"
    spent = bins.get_privacy_spent()
    assert spent.accounting_method == "monte-carlo, confidence 1 - 1e-06"
    sure = accountant(Identity(8), 1.0, 4, confidence=1 - 9e-6)
    # Nine tenths of delta are gone.
    assert sure.epsilon_after(8, DELTA) > 1.1 * bins.epsilon_after(8, DELTA)
    with pytest.raises(ValueError, match=r"delta=1e-06 must be > 1 - confidence"):
        bins.epsilon_after(8, 1e-6)
    for wrong in (0.0, 1.0, "sure"):
        with pytest.raises((ValueError, TypeError), match="confidence"):
            accountant(Identity(8), 1.0, 4, confidence=wrong)


@quick
def test_equal_plans_have_equal_epsilons_and_resume():
    one, other = (accountant(Identity(8), 1.0, 4) for _ in range(2))
    one.advance(5)
    other.load_state_dict(one.state_dict())
    assert other.get_epsilon(DELTA) == one.get_epsilon(DELTA)
    with pytest.raises(ValueError, match="another mechanism"):
        accountant(Identity(8), 1.0, 2).load_state_dict(one.state_dict())


# Evaluations beside it ---------------------------------------------------------------


@quick
def test_evaluations_are_one_more_shift_whatever_the_bin():
    noise, mu = 1.2, 0.7
    beside = Evaluations(2, math.sqrt(2) / mu)
    bins = accountant(Identity(4), noise, 2, evaluations=beside)
    for rounds, turns, own in ((2, 1, mu**2 / 2), (4, 2, mu**2)):
        gram = turns / noise**2 * np.eye(2) + own
        epsilon = bins.epsilon_after(rounds, DELTA)
        assert max(two_shifts(gram, [0.5, 0.5], epsilon)) <= DELTA
        assert max(two_shifts(gram, [0.5, 0.5], 0.96 * epsilon)) > DELTA
        assert bins.delta_after(rounds, epsilon) == pytest.approx(DELTA, rel=0.02)
    one = accountant(Identity(4), noise, 1, evaluations=beside)
    assert one.epsilon_after(4, DELTA) == pytest.approx(
        gaussian_epsilon(math.hypot(2 / noise, mu), 0.99 * DELTA), rel=1e-6
    )


@quick
@pytest.mark.parametrize(
    "target",
    [{"max_epsilon": 3.0, "noise_multiplier": None}, {"noise_multiplier": 1.5}],
)
def test_evaluations_cost_noise_and_no_epsilon(target):
    options = {"factorization": BandedToeplitz(12, np.array([1.0, 0.5])), **target}
    plain = planned(**options)
    shared = planned(
        **options, evaluation=PrivateEvaluation(bounds={"a": 1.0}, share=0.3)
    )
    spent, without = (
        each.accountant.epsilon_after(12, 1e-3) for each in (shared, plain)
    )
    # A plan's own epsilon is met as other draws know it.
    assert 0.96 * without < spent <= target.get("max_epsilon", 1.01 * without)
    assert shared.noise_std > 1.05 * plain.noise_std


@quick
def test_what_is_chosen_is_chosen_without_the_draws_that_bound_it(monkeypatch):
    """Of plans and targets that the account draws for, the luckiest would win."""
    used, loss = set(), balls_in_bins._loss

    def spy(plan, deviation, beside, stream, fewer):
        used.add(stream)
        return loss(plan, deviation, beside, stream, fewer)

    monkeypatch.setattr(balls_in_bins, "_loss", spy)
    plan = {"num_bins": 4, "delta": DELTA}
    balls_in_bins.best_in_bins(2.0, first=Identity(8), memory=1, **plan)
    balls_in_bins.target_in_bins(1.0, factorization=Identity(8), **plan)
    assert used == {balls_in_bins._SEARCH}
    balls_in_bins.noise_multiplier_in_bins(2.0, factorization=Identity(8), **plan)
    assert used == {balls_in_bins._SEARCH, balls_in_bins._ACCOUNT}


def test_with_one_bin_evaluations_and_training_are_one_gaussian_release():
    noise = noise_multiplier_in_bins(
        2.0, DELTA, factorization=Identity(4), num_bins=1, beside=0.3
    )
    mu = math.hypot(2 / noise, 0.3)
    assert gaussian_delta(mu, 2.0) == pytest.approx(0.99 * DELTA, rel=1e-6)


def test_evaluations_may_not_be_all():
    with pytest.raises(ValueError, match=r"beside=1.0 must be < 0\.\d+"):
        noise_multiplier_in_bins(
            1.0, DELTA, factorization=Identity(4), num_bins=2, beside=1.0
        )


# A mechanism with it ------------------------------------------------------------------


def planned(sampler=None, **changes):
    usual = {
        "num_rounds": 12,
        "num_sampled_clients": 6,
        "population_size": 24,
        "noise_multiplier": 2.0,
        "target_delta": 1e-3,
        "amplified": True,
    }
    mechanism = Mechanism(**{**usual, **changes})
    return PrivateSum(mechanism, sampler or BallsInBinsSampler(4), {})


@quick
def test_a_mechanism_says_how_it_knows():
    settings = planned(factorization="identity").settings()
    assert settings["Privacy"].endswith("; by Monte Carlo, confidence 1 - 1e-05")
    poisson = planned(PoissonSampler(probability=0.25), factorization="identity")
    assert "Monte Carlo" not in poisson.settings()["Privacy"]


@quick
def test_a_mechanism_of_any_bands_takes_less_noise_than_without_amplification():
    target = {"noise_multiplier": None, "max_epsilon": 3.0}
    for bands in (1, 3, 6):
        coefficients = np.array([1.0, 0.5, 0.3, 0.2, 0.2, 0.1])[:bands]
        plan = BandedToeplitz(12, coefficients)
        amplified = planned(factorization=plan, **target)
        assert amplified.accountant.epsilon_after(12, 1e-3) <= 3.0
        # More bands than the separation are refused without.
        if bands <= 4:
            known = planned(
                MinSeparationSampler(4), factorization=plan, amplified=False, **target
            )
            assert amplified.noise_std < 0.95 * known.noise_std


@quick
def test_the_best_is_correlated_noise_for_clients_that_wait():
    chosen = planned(memory=2).factorization
    apart = planned(MinSeparationSampler(4), memory=2, amplified=False).factorization
    assert chosen.fingerprint() == apart.fingerprint()
    assert chosen.name != "identity"


@quick
def test_with_a_target_bands_are_compared_by_what_they_need():
    target = {"noise_multiplier": None, "max_epsilon": 1.5, "num_rounds": 32}
    errors = {}
    for bands in (None, 2, 4, 8):
        plan = (
            BandedToeplitz.optimize(32, bands, normalize_columns=True)
            if bands
            else None
        )
        options = {"factorization": plan} if plan else {"memory": 7}
        amplified = planned(
            BallsInBinsSampler(8), num_sampled_clients=3, **target, **options
        )
        error = amplified.noise_std * amplified.factorization.rms_error()
        errors[bands] = error
        if bands is None:
            chosen = amplified.factorization
    assert errors.pop(None) == min(errors.values())
    # Without amplification it would be another one.
    assert chosen.name != planned(memory=7, num_rounds=32).factorization.name


@quick
def test_without_amplification_bins_are_a_separation():
    bins = planned(amplified=False)
    apart = planned(MinSeparationSampler(4), amplified=False)
    assert bins.noise_std == apart.noise_std
    assert not bins.sampler.is_secret


class Public(Sampler):
    """Bins that everybody can compute."""

    def sample(self, clients, size, server_round, purpose):
        return [c for c in clients if c % 4 == server_round % 4]

    def guarantee(self):
        return Guarantee(kind="balls-in-bins", min_separation=4)


class Undrawn(BallsInBinsSampler):
    """States nothing."""


@pytest.mark.parametrize(
    ("sampler", "changes", "message"),
    [
        (None, {"factorization": "tree"}, "C is square and lower-triangular"),
        (None, {"factorization": TreeAggregation(12)}, "square and lower-triangular"),
        (Public(), {"factorization": "identity"}, "says how it draws, not Public"),
        (Undrawn(4), {"factorization": "identity"}, "says how it draws, not Undrawn"),
        (
            None,
            {"num_rounds": 5000, "factorization": "identity"},
            r"rounds=5000 must be <= 4096",
        ),
        (BallsInBinsSampler(24), {}, r"num_sampled_clients=6 must be at most 2"),
        (BallsInBinsSampler(4, seed=5), {}, "left out with amplified=True"),
    ],
)
def test_what_cannot_be_accounted_for_is_refused(sampler, changes, message):
    with pytest.raises(ValueError, match=message):
        planned(sampler, **changes)


@quick
def test_a_run_reports_the_same_epsilon_and_stops_at_its_budget():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        strategy = AdditiveStrategy(
            mechanism=Mechanism(
                num_rounds=12,
                num_sampled_clients=6,
                population_size=24,
                noise_multiplier=1.0,
                max_epsilon=4.5,
                target_delta=1e-3,
                factorization="identity",
                amplified=True,
            ),
            sampler=BallsInBinsSampler(4),
        )
    spent = strategy.private_sum.accountant
    steps = [spent.epsilon_after(rounds, 1e-3) for rounds in (4, 8, 12)]
    assert steps[1] <= 4.5 < steps[2]
    spent.advance(8)
    with pytest.raises(Exception, match="would exceed max_epsilon"):
        spent.require_budget()
